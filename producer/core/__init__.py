"""The parts of the client: requests, the publisher, replies and deadlines."""
