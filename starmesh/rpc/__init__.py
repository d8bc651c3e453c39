"""gRPC plumbing shared by all services: server, channels, errors as status codes, protobuf <-> types."""
