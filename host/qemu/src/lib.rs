//! The QEMU driver: argument vectors, processes, migration verbs.
//!
//! ```text
//!   Program ──discover──▶ Capabilities ─┐
//!      │                                ├─▶ model::host::Hypervisor
//!      └──probe────────▶ Verdict ───────┘
//!
//!   Launch ──spawn──▶ Vm ──act(Action)──▶ monitor ──QMP──▶ QEMU, in a session of its own
//!   (restart) adopt ─▶ │ ◀──Happened───── (task)  ◀─events, pidfd─┘
//! ```
//!
//! Invariants:
//! - What a QEMU can do is asked of it ([`discover`]), never concluded from its version.
//! - An accelerator is chosen by what it does ([`probe`]), never by whether its device is there.
//! - What the guest sees follows from the stored layout alone, so that both ends of a migration build the same machine.
//! - QEMU runs as its own user, without privileges, sandboxed, in a directory that it cannot enter: sockets, disks, taps, kernel
//!   and migration streams reach it as descriptors. No port is opened, no shell is started, no path of a guest is trusted.
//! - Its files are opened by whoever knows that they are the right ones ([`Given`]): no path is opened here.
//! - The process outlives the agent. A pidfd, checked against the start time, is what is waited on and killed: never a bare pid.
//! - The driver decides nothing. It tells `settled: false` when QEMU stopped the guest by itself and may yet resume it.

mod argv;
mod capability;
mod copy;
mod launch;
mod monitor;
mod probe;
mod probe_guest;
mod process;
mod program;
mod scope;
mod vm;

pub use argv::ArgvError;
pub use capability::{Capabilities, DiscoverError, discover};
pub use launch::{AdoptError, Given, GivenKernel, GivenVolume, MonitorError, SpawnError, clear, living};
pub use probe::{ProbeError, Verdict, open_kvm, probe};
pub use process::Pinned;
pub use program::Program;
pub use scope::own_scope;
pub use vm::{ActError, Handle, Qemu, Vm};
