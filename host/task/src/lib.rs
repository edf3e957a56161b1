//! One VM on one host, as a pure state machine.
//!
//! ```text
//!   order, peer's word,        ┌──────┐   journal, prepare, act on the hypervisor,
//!   hypervisor's event, ─────▶ │ Task │ ─────▶ tunnel, port, peer, timer, report
//!   timer, journal             └──────┘
//! ```
//!
//! The agent owns one [`Task`] a VM, feeds it [`Input`]s and carries out its [`Effect`]s strictly in order.
//!
//! Invariants:
//! - What must survive a crash is in [`Saved`]; [`Effect::Save`] precedes every effect that it announces (run, kill, delete).
//! - An order whose revision is not greater than the last is answered from [`Saved`], never carried out again.
//! - The guest runs only while this host holds the VM: see `handover`.
//! - A restarted agent goes on by [`Task::recover`], which is the same path as the first start.

mod effect;
mod flow;
mod life;
mod moving;
mod saved;
mod search;
mod standstill;
mod task;

pub use effect::{Effect, Input, Missed, Peer, Timer, Tunnel, TunnelEvent};
pub use saved::{Decision, Pending, Role, Saved};
pub use standstill::nearly_done;
pub use task::Task;
