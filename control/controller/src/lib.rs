//! The loop that joins decision, memory and dispatch, and the ports by which agents and people reach it.
//!
//! ```text
//!   edges ── Handle ──▶ core ── step ──▶ engine
//!                        │ ▲ one commit a batch
//!                        ▼ │
//!                      storage ── store           committed: tokens, hosts, blobs, notices, for those who do not wait
//!                        │ only then
//!         ┌──────────────┼───────────────┐
//!      replies     links ── agents ◀── mutual TLS ── hosts      watch ── notices, progress
//! ```
//!
//! Invariants:
//! - Durable first: nothing leaves before the commit that covers it: no reply, order, acknowledgement, notice, nor read.
//! - After a failed commit nothing of its batch leaves, and the world is loaded again.
//! - What a token is worth is asked with each request, and again in its transaction. What a right opened ends with the right.
//! - Passwords are checked beside the loop, few at a time, equally long whatever is wrong.
//! - Who an agent is stands in its certificate. One live session a host; a newer one replaces the older.
//! - A report is acknowledged after its commit, and takes effect once: numbers within a process, the engine's revisions beyond.
//! - Everything is bounded: inputs, batches, orders that wait, connections, uploads, consoles, silence.

mod admission;
mod agents;
mod blobs;
mod clock;
mod committed;
mod config;
mod consoles;
mod core;
mod handle;
mod joining;
mod links;
mod memory;
mod meters;
mod metrics;
mod passwords;
mod people;
mod serve;
mod start;
mod storage;
mod telemetry;
mod watch;

pub use blobs::BLOB_BYTES_MAX;
pub use config::{ClientFile, Config, DefaultNetwork, StateDir};
pub use core::{Ended, Health};
pub use handle::{Handle, SubmitOptions};
pub use joining::CertificateError;
pub use memory::Memory;
pub use people::Session;
pub use start::{Controller, StartError};
pub use storage::{Storage, StorageError, Stored, Waited};
pub use telemetry::Span;
pub use watch::WatchItem;
