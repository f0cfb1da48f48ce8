"""One command to see it work: Redis, mail catcher, worker, API, Flower, and one code from request to mailbox."""
