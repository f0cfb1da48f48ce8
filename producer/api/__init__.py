"""The doors: HTTP and gRPC in front of one client. Needs the extra `doors`."""
