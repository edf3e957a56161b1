//! What a hypervisor must offer: a closed interface, and nothing of how one does it.
//!
//! ```text
//!            Action                       QMP, signals
//!   task ───────────▶ agent ───▶ driver ───────────▶ hypervisor's process
//!     ▲                                 │
//!     └──────────── Happened ◀──────────┘
//! ```
//!
//! Invariants:
//! - Every verb is in [`Action`]; each variant says when it is legal. A driver adds none of its own.
//! - An action is asked once and answered by what [`Happened`]; a driver never waits for a guest.
//! - Actions are idempotent where the interface says so, since a restarted agent asks again.
//! - The process outlives the agent: [`Process`] is enough to find it again.

use std::path::PathBuf;

use model::{Definition, Millis, Round};
use serde::{Deserialize, Serialize};

/// What is needed to start a hypervisor's process for a VM, besides its open files: those are no data, and are the driver's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// The VM, with its exact hardware.
    pub definition: Definition,
    /// How it begins.
    pub mode: Mode,
    /// A directory of its own for sockets, 0700.
    pub run_dir: PathBuf,
    /// The user and group it runs as; no other process has them.
    pub uid: u32,
}

/// How a VM's process begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// At its first instruction, standing until [`Action::Run`].
    Boot,
    /// With no state of its own, waiting for a migration ([`Action::Listen`]); it stands until [`Action::Run`] also when the state
    /// has come.
    Wait,
}

/// A hypervisor's process: enough to find it again, and to tell it from a later one with the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// When it started, in clock ticks after boot (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
}

/// What a task asks of a running process. Each is answered by a [`Happened`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Let the guest run. Legal always but while state is loading; done when it runs. Answered by [`Happened::Running`].
    Run,
    /// Make the guest stand. Idempotent. Answered by [`Happened::Standing`].
    Stand,
    /// Press the power button. Answered only by what the guest does.
    PowerButton,
    /// Reset the guest. Answered by [`Happened::Reset`].
    Reset,
    /// End the process, at once. Legal always, idempotent. Answered by [`Happened::Died`].
    Kill,
    /// Destination: be ready for the stream on the socket [`INCOMING_SOCKET`]. Legal once, in [`Mode::Wait`]. Answered by
    /// [`Happened::Listening`].
    Listen,
    /// Source: send the memory to the socket [`OUTGOING_SOCKET`]. Legal when no copy is under way. Answered by
    /// [`Happened::Copying`] again and again, then [`Happened::Copied`] or [`Happened::CopyFailed`].
    Copy(CopyLimits),
    /// Source, after an adoption: tell of the copy that is under way. Answered as [`Action::Copy`] is; by [`Happened::CopyFailed`]
    /// when none was begun.
    Attend,
    /// Source: give the copy up. Legal always; done when there is none. Answered by [`Happened::CopyFailed`], or by
    /// [`Happened::Copied`] when it came too late.
    CancelCopy,
    /// Tell the network, again and again for half a second, where the guest is now. Not answered.
    Announce,
}

/// Bounds of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyLimits {
    /// Bytes a second; `None` as fast as the link takes.
    pub bytes_per_s_max: Option<u64>,
    /// Longest standstill aimed at.
    pub downtime_max: Millis,
}

/// The socket within [`Launch::run_dir`] on which a destination waits for the stream.
pub const INCOMING_SOCKET: &str = "incoming.sock";
/// The socket within [`Launch::run_dir`] to which a source sends the stream.
pub const OUTGOING_SOCKET: &str = "outgoing.sock";
/// The socket within [`Launch::run_dir`] of the guest's serial console.
pub const SERIAL_SOCKET: &str = "serial.sock";

/// What happened to a VM's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happened {
    /// The process is there and answers: just started, or found again after the agent restarted.
    Up {
        /// What its guest does.
        condition: Condition,
    },
    /// The process could not be started, or what was to be adopted is gone.
    NotUp {
        /// Why.
        reason: String,
    },
    /// The guest runs.
    Running {
        /// By this host's wall clock, ms since 1970.
        at_ms: i64,
    },
    /// The guest stands.
    Standing {
        /// By this host's wall clock, ms since 1970.
        at_ms: i64,
        /// Whether it stands because it was told to, and can be trusted to stand on: `false` when the hypervisor has begun to
        /// complete a migration and may yet resume the guest by itself.
        settled: bool,
    },
    /// The guest was reset.
    Reset,
    /// The guest powered itself off; the process is about to end.
    PoweredOff,
    /// The process is dead, for certain.
    Died {
        /// What is known of it.
        detail: String,
    },
    /// An action could not be done; all is as it was.
    Refused {
        /// Which.
        action: &'static str,
        /// Why.
        reason: String,
    },
    /// Destination: it is ready for the stream.
    Listening,
    /// Source: how far the copy is.
    Copying(CopyState),
    /// Source: all has been sent, and the destination has said that it loaded it. The guest stands and will not run by itself.
    Copied {
        /// What it cost.
        cost: CopyCost,
    },
    /// Source: the copy ended without success. The guest runs, unless it was told to stand.
    CopyFailed {
        /// Why.
        reason: String,
    },
    /// Destination: the whole state is here and loaded; the guest stands.
    Loaded,
    /// Destination: the stream ended or broke before the state was whole.
    LoadFailed {
        /// Why.
        reason: String,
    },
}

/// What a guest does, as its process tells when it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// It runs.
    Running,
    /// It stands.
    Standing,
    /// It stands, and all its state has been sent: the copy completed.
    Sent,
    /// It has no state yet: waits for, or loads, a migration.
    Loading,
    /// It has powered off, or failed beyond repair.
    Ended,
}

/// How far a copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyState {
    /// Bytes sent.
    pub bytes: u64,
    /// Bytes left, as known now.
    pub remaining_bytes: u64,
    /// Speed over the last interval, bytes a second; 0 when not known yet.
    pub bytes_per_s: u64,
    /// Round, from 1.
    pub round: u64,
    /// The round that ended with this, if one did.
    pub ended: Option<Round>,
}

/// What a copy cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyCost {
    /// The hypervisor's own figure for the guest's standstill, ms.
    pub downtime_ms: u64,
    /// Bytes of guest memory sent.
    pub bytes: u64,
}
