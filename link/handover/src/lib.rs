//! The protocol by which a VM changes hosts: never two runners, and never nobody for longer than the rules need.
//!
//! ```text
//!   source A, generation g                         destination B, generation g+1
//!
//!   Copying ──────────── memory, device state ───────────▶ Waiting
//!      │ guest stands for good                                │
//!      ▼                                                      │ has the release AND the whole state
//!   journal: Released ───────── Release, again and again ───▶ ▼
//!      │                                              journal: Run ──▶ guest runs, port opens
//!      │◀───────────────────── Run ───────────────────────────┤
//!      ▼                                                      │ or: deadline, or its process died;
//!   HandedOver: tear down                                     ▼ its process is dead
//!      │                                              journal: Void
//!      │◀───────────────────── Void ──────────────────────────┘
//!      ▼
//!   journal: Reclaimed, runs again under g+2
//! ```
//!
//! Both sides are pure: [`Source::step`] and [`Destination::step`] take what happened and return what to do, in order. The caller
//! writes the journal where [`SourceEffect::Journal`] or [`DestinationEffect::Journal`] says so *before* it goes on.
//!
//! Invariants:
//! - From `Released` on, A runs the guest only after B's journalled `Void`, and then under a generation above B's.
//! - B journals either `Run` or `Void`, whichever comes first, never both. `Run` needs the release and the whole state; `Void` needs
//!   its process to be dead.
//! - A missing record means "never happened" only in the boot in which the terms were made. In any other it means *unknown*, and
//!   nothing runs until both hosts were fenced or rebooted.
//! - A does not ask its guest to stand while B's agent would not hear it: it holds the stream until it would, or its deadline passes.
//! - Every message may be lost, repeated or late; every step may be the last before a crash.
//! - No step needs the controller, nor an fsync: a host that loses power runs no guest, and its boot id tells.
//!
//! Source of the traps that shaped it: docs/adr/0014-hand-over.md.

mod destination;
mod source;

pub use destination::{Destination, DestinationEffect, DestinationInput, Receiving, Recovered};
pub use source::{Source, SourceEffect, SourceInput, Standing};
