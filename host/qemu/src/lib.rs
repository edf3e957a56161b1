//! The QEMU driver: argument vectors, processes, migration verbs.
