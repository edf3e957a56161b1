//! The durable world and its outbox.
