//! What a task's journal keeps: the whole of it in each record, so that the last one is enough.

use handover::{Destination, Source};
use model::{
    BootId, Definition, Epoch, Generation, HostId, Message, Millis, OperationId, Revision, Terms, VmId,
    order::{Endpoint, Happening, VolumePlace},
    vm::Power,
};
use serde::{Deserialize, Serialize};

/// What is known of a VM on this host, and survives the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Form of this record; 1 now.
    pub version: u16,
    /// The VM.
    pub vm: VmId,
    /// The host's boot when this was written.
    pub boot: BootId,
    /// The highest leader's epoch that was seen.
    pub epoch: Epoch,
    /// The generation under which it is, or was, held here.
    pub generation: Generation,
    /// The last order that was accepted.
    pub revision: Revision,
    /// The last order that was refused without being accepted: repeated, it is refused again.
    #[serde(default)]
    pub refused: Revision,
    /// On behalf of which operation.
    pub operation: Option<OperationId>,
    /// What it is made of; `None` before the first order and after the last trace is gone.
    pub definition: Option<Box<Definition>>,
    /// What it should do here.
    pub power: Power,
    /// This host's part.
    pub role: Role,
    /// The order that is being carried out, to be taken up again after a restart.
    pub pending: Option<Pending>,
    /// The answer to the last order, once there is one.
    pub answer: Option<Happening>,
    /// The last decision as a destination, to be repeated to a source that did not hear it.
    pub decision: Option<Decision>,
}

/// This host's part in a VM's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "kebab-case")]
pub enum Role {
    /// None: never held, handed over, or removed.
    None,
    /// It holds the VM, running or not.
    Holder,
    /// It gives the VM away.
    Source {
        /// The terms.
        terms: Box<Terms>,
        /// Where to.
        to: Endpoint,
        /// How far.
        state: Source,
    },
    /// It gets the VM.
    Destination {
        /// The terms.
        terms: Box<Terms>,
        /// How far.
        state: Destination,
    },
}

/// An order that is being carried out. Migrations are in [`Role`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "pending", rename_all = "kebab-case")]
pub enum Pending {
    /// Start it.
    Start,
    /// End it.
    End {
        /// How long the guest has to power off by itself; `None` once it has no time left, or never had any.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        grace: Option<Millis>,
    },
    /// Make it stand.
    Pause,
    /// Let it run.
    Resume,
    /// Reset it.
    Reboot,
    /// End it, and delete these.
    Remove {
        /// Its volumes.
        volumes: Vec<VolumePlace>,
    },
}

/// A destination's decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The source it concerns.
    pub source: HostId,
    /// Names the terms.
    pub granted: Generation,
    /// `Run` or `Void`.
    pub message: Message,
}

impl Saved {
    /// The version of this record that is written now.
    pub const VERSION: u16 = 1;

    /// Before the first order.
    #[must_use]
    pub fn new(vm: VmId, boot: BootId) -> Self {
        Self {
            version: Self::VERSION,
            vm,
            boot,
            epoch: Epoch(0),
            generation: Generation(0),
            revision: Revision(0),
            refused: Revision(0),
            operation: None,
            definition: None,
            power: Power::Off,
            role: Role::None,
            pending: None,
            answer: None,
            decision: None,
        }
    }
}
