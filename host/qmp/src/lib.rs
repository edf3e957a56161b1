//! A typed QMP codec and session. Knows no VMs.
//!
//! QMP is QEMU's control protocol (QEMU's `docs/interop/qmp-spec.rst`): one JSON object a line over a Unix socket.
//!
//! ```text
//!   execute(Stop) ──► queue ──► ┌─────────┐ line (+ SCM_RIGHTS) ──► QEMU
//!   execute(Yank) ──► urgent ─► │ session │
//!        ▲                      │  task   │ ◄── lines ── QEMU
//!        └──── answer, by id ◄──┤         │
//!   Events::recv ◄─ bounded ◄───┴─────────┘
//! ```
//!
//! Invariants:
//! - One task owns the socket. It never waits for a reader of events, so answers always pass.
//! - Events arrive in QEMU's order with QEMU's time. An essential event ([`Event::is_essential`]) is never lost: if its
//!   reader falls too far behind, the session closes and says so; its owner reconnects and asks `query-status`.
//! - Every command ends: by its answer, by its deadline, or by the session's end with a typed reason.
//! - Everything is bounded: line length, event length and queue, commands waiting and in flight, time.
//! - A descriptor goes with exactly the command that names it, since a second one in flight would replace it in QEMU.
//! - What a peer sends is never trusted: garbage closes the session with a reason, it does not panic. Unknown fields are
//!   ignored, absent ones defaulted, unknown enum values kept as text.

mod answer;
mod codec;
mod command;
mod error;
mod event;
mod open_enum;
mod session;

pub use answer::*;
pub use codec::{Codec, Message, Request};
pub use command::*;
pub use error::{CloseReason, CodecError, CommandError, ConnectError};
pub use event::{BlockJob, BlockJobStep, Event, EventKind};
pub use session::{Events, Limits, Session};
