//! The QEMU driver: argument vectors, processes, migration verbs.
//!
//! ```text
//!   Program ──discover──▶ Capabilities ─┐
//!      │                                ├─▶ model::host::Hypervisor
//!      └──probe────────▶ Verdict ───────┘
//! ```
//!
//! Invariants:
//! - What a QEMU can do is asked of it ([`discover`]), never concluded from its version.
//! - An accelerator is chosen by what it does ([`probe`]), never by whether its device is there.

mod capability;
mod probe;
mod probe_guest;
mod program;

pub use capability::{Capabilities, DiscoverError, discover};
pub use probe::{ProbeError, Trial, Verdict, probe};
pub use program::Program;
