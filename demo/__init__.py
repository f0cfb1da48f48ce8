"""One command to see it work: an embedded Redis, a mail catcher, a worker, and one code from request to mailbox."""
