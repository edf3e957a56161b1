//! Moving a VM: the six stages, the terms under which authority moves, what the two agents say to each other, and the receipt.
//!
//! Source: Clark et al., "Live Migration of Virtual Machines", NSDI 2005, section 3.2.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{BootId, Generation, HostId, Millis, OperationId, Timestamp, VmId};

/// The terms of one hand-over, fixed before the guest can stop and stored by the controller and both agents. They name all that a
/// decision needs, so that none needs the controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Terms {
    /// The VM.
    pub vm: VmId,
    /// The operation that moves it.
    pub operation: OperationId,
    /// Who holds it.
    pub source: HostId,
    /// The source's boot when the terms were made.
    pub source_boot: BootId,
    /// Who gets it.
    pub destination: HostId,
    /// The destination's boot when the terms were made.
    pub destination_boot: BootId,
    /// The source's generation: g.
    pub held: Generation,
    /// The destination's, if it runs: g+1 (above all that were ever reserved).
    pub granted: Generation,
    /// The source's, if it gets the VM back after the destination's `void`: g+2.
    pub reclaimed: Generation,
    /// Whether the guest is to run afterwards; `false` when its user paused it.
    pub run: bool,
    /// How long the whole may take before the source, if it has not released, gives up; the destination allows a little more.
    pub deadline: Millis,
    /// How long the destination, with the release or the whole state in hand, waits for the other before it decides `void`.
    pub settle: Millis,
}

/// What two agents say to each other about a hand-over, over their own connection or relayed by the controller. Each message may
/// be lost, repeated or late.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// Source to destination: I have given up the VM; it is yours if you have all of it.
    Release,
    /// Destination to source: I run it, or it is there paused as its user wanted.
    Run,
    /// Destination to source: I do not have it and never will under these terms.
    Void,
    /// Either to the other, after a restart: what have you decided?
    Ask,
}

/// The stages of a migration, as an operation goes through them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// A destination is chosen and checked.
    PreMigration,
    /// The destination reserves and starts a container that waits.
    Reservation,
    /// Memory is copied in rounds while the guest runs.
    IterativePreCopy,
    /// The guest stands; the rest is copied.
    StopAndCopy,
    /// Authority moves.
    Commitment,
    /// The guest runs on the destination; the source is torn down.
    Activation,
    /// Done: nothing is left on the source.
    Finished,
    /// Not done: the guest is where it was.
    RolledBack,
}

impl Stage {
    /// Whether nothing follows.
    #[must_use]
    pub const fn is_last(self) -> bool {
        matches!(self, Self::Finished | Self::RolledBack)
    }
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::PreMigration => "pre-migration",
            Self::Reservation => "reservation",
            Self::IterativePreCopy => "iterative-pre-copy",
            Self::StopAndCopy => "stop-and-copy",
            Self::Commitment => "commitment",
            Self::Activation => "activation",
            Self::Finished => "finished",
            Self::RolledBack => "rolled-back",
        })
    }
}

/// A migration as its operation records it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// The terms.
    pub terms: Terms,
    /// Where it is now.
    pub stage: Stage,
    /// When each stage was entered, in order; on the controller's clock, for display.
    pub entered: Vec<(Stage, Timestamp)>,
    /// Why the source cannot be told to go on yet, or why it rolled back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Somebody asked to cancel it.
    #[serde(default)]
    pub cancelling: bool,
    /// What the source measured, once it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
    /// When its guest stood on the source, by that host's wall clock, ms since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_at_ms: Option<i64>,
    /// When its guest ran on the destination, by that host's wall clock, ms since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_at_ms: Option<i64>,
}

/// One round of pre-copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Round {
    /// 1 is the whole memory.
    pub number: u64,
    /// How long it took, ms.
    pub duration_ms: u64,
    /// Bytes sent in it.
    pub bytes: u64,
    /// Bytes left at its end.
    pub remaining_bytes: u64,
    /// Pages that the guest wrote, a second, as QEMU last counted.
    pub dirty_pages_per_s: u64,
    /// Speed at its end, Mbit/s.
    pub mbps: u64,
}

/// What a migration cost. Times on one host's clock unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Receipt {
    /// How: `pre-copy`, or `stop-and-copy` where the guest stood from the first byte on.
    pub algorithm: String,
    /// From the client's request to the guest running on the destination; the controller's clock, ms.
    pub request_to_running_ms: u64,
    /// From the request to nothing left on the source; the controller's clock, ms.
    pub total_ms: u64,
    /// QEMU's own figure for the guest's standstill on the source, ms; `None` where the agent was restarted meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu_downtime_ms: Option<u64>,
    /// From the source's STOP to the destination's RESUME, by the two hosts' wall clocks, ms; true only where they are one
    /// clock or well synchronised. May be negative when they are not. `None` for a paused guest,
    /// or where an agent was restarted meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_to_resume_ms: Option<i64>,
    /// Bytes of guest memory sent; `None` where the agent was restarted meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Bytes through the tunnel; `None` likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wire_bytes: Option<u64>,
    /// Its rounds.
    pub rounds: Vec<Round>,
    /// Time in each stage, in order; the controller's clock.
    pub stages: Vec<StageTime>,
}

/// How long a stage took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StageTime {
    /// The stage.
    pub stage: Stage,
    /// Milliseconds after the request.
    pub started_ms: u64,
    /// Milliseconds.
    pub duration_ms: u64,
}
