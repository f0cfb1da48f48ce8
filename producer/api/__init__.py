"""The API server: HTTP and gRPC in front of one client. Needs the extra `api`."""
