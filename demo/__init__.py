"""One command to see it work: Redis, mail catcher, worker, doors, Flower, and one code from request to mailbox."""
