//! The native JSON interface: OpenAPI, operations, event stream.
