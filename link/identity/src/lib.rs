//! The cluster authority, node identities and mutual TLS.
