//! What a task is told, and what it wants done.

use driver::{Action, Happened, Launch, Mode};
use model::{
    Definition, Generation, HostId, Message, Millis, OperationId, Refusal, Terms, operation::Progress, order::Endpoint,
    order::VmOrder, order::VmReport, order::VolumePlace,
};

use crate::saved::Saved;

/// What a task is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The controller wants something.
    Order(Box<VmOrder>),
    /// [`Effect::Prepare`] is done: what the hypervisor needs to start.
    Prepared(Result<Box<Launch>, Refusal>),
    /// Something happened to the VM's process.
    Driver(Happened),
    /// The agent hears the process no longer, without having been told that it is dead: its guest may well run.
    Lost,
    /// Something happened to the migration's tunnel.
    Tunnel(TunnelEvent),
    /// Source: the connection to the destination's agent came or went.
    PeerLink {
        /// Whether it hears what is said to it.
        up: bool,
    },
    /// The other agent of a hand-over said something.
    Peer(Peer),
    /// A timer ran out.
    Timer(Timer),
    /// [`Effect::DeleteFiles`] is done.
    FilesDeleted(Result<(), Refusal>),
}

/// A word of a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The other host. The agent checks it against the certificate.
    pub host: HostId,
    /// Names the terms.
    pub granted: Generation,
    /// What is said.
    pub message: Message,
}

/// What a task wants done, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Append this to the journal before going on: how it was when the effect was decided, which is not how it is at the step's end.
    Save(Box<Saved>),
    /// Fetch blobs that are missing, make the ports, blocked. For [`Mode::Boot`] make volumes that are missing; for [`Mode::Wait`]
    /// they must be there. Answered by [`Input::Prepared`].
    Prepare {
        /// The VM.
        definition: Box<Definition>,
        /// How it begins.
        mode: Mode,
    },
    /// Start the hypervisor's process. Answered by [`Happened::Up`] or [`Happened::NotUp`].
    Spawn(Box<Launch>),
    /// Find the hypervisor's process again. Answered likewise.
    Adopt,
    /// Ask the process for something.
    Act(Action),
    /// Let frames through the VM's ports, and announce their addresses from here.
    OpenPorts,
    /// Remove the VM's ports and its run directory. Idempotent.
    Clear,
    /// Delete its volumes. Answered by [`Input::FilesDeleted`]. Idempotent.
    DeleteFiles(Vec<VolumePlace>),
    /// Start, find again or end the migration's tunnel.
    Tunnel(Tunnel),
    /// What reaches the VM's ports while its guest stands for a move. Best effort: not answered, nothing depends on it.
    Missed(Missed),
    /// Say this to the other agent; by the controller where the direct way is cut.
    Say(Peer),
    /// Set a timer; the same timer set again starts anew.
    Set(Timer, Millis),
    /// Stop a timer.
    Stop(Timer),
    /// Tell the controller.
    Report(Box<VmReport>),
    /// Tell how far an operation is.
    Progress(OperationId, Progress),
    /// Nothing of the VM is left here: the task may be dropped, its record kept as a tombstone.
    Gone,
}

/// What the guest of a move misses while it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missed {
    /// Source: the guest may stand from now on at any time; keep what reaches its ports. Said again while it still runs: what came long
    /// before needs not be kept any more.
    Keep,
    /// Source: the destination has the VM, so hand it over, and what comes late.
    HandOver {
        /// The destination.
        to: HostId,
        /// Names the terms.
        granted: Generation,
        /// When the guest stood, by this host's wall clock, ms since 1970.
        stood_at_ms: i64,
    },
    /// The guest stays: its own process finds in its ports what it missed.
    Drop,
}

/// A migration's tunnel.
#[derive(Clone, Debug, PartialEq)]
pub enum Tunnel {
    /// Destination: listen for the source. Answered by [`TunnelEvent::Listening`].
    Listen(Box<Terms>),
    /// Source: connect. Answered by [`TunnelEvent::Connected`].
    Dial(Box<Terms>, Endpoint),
    /// After a restart: find it again. Answered by where it stands.
    Adopt,
    /// Source: let the stream flow, for as long as this agent lives and does not say otherwise.
    Flow,
    /// Source: hold the stream. That is how it begins, and how it is when the agent is gone.
    Hold,
    /// Source: the VM is given away, so the stream flows to its end whatever becomes of this agent.
    Free,
    /// End it. Answered by [`TunnelEvent::Closed`] where one was.
    Close,
}

/// What happened to a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TunnelEvent {
    /// It waits for the source on this port.
    Listening {
        /// The port.
        port: u16,
    },
    /// It is connected to the destination.
    Connected,
    /// It could not be made, or broke.
    Failed {
        /// Why.
        reason: String,
    },
    /// It ended after all was sent.
    Closed {
        /// Bytes on the wire.
        wire_bytes: u64,
    },
}

/// Timers of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// The guest's grace to power off is over.
    Grace,
    /// The hand-over's own deadline.
    Deadline,
    /// The wait for the second of release and state is over.
    Settle,
    /// Time to say it again.
    Resend,
    /// The tunnel did not end by itself.
    Linger,
    /// The guest should run, and the process did not let it: time to ask again.
    Retry,
}
