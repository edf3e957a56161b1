//! The serialised forms between processes, and their bounds.
