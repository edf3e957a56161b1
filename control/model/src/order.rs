//! Between controller and agents: orders down, reports up.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::{
    Epoch, Generation, HostFacts, HostId, Mac, Message, Millis, Name, OperationId, PoolId, PortId, PortPolicy, Receipt,
    Refusal, Revision, TemplateId, Terms, VmId, VolumeId,
    addressing::Addressing,
    layout::Layout,
    operation::Progress,
    seed::GuestSeed,
    storage::{Digest, Format},
    template::{Blob, Boot, Content},
};

/// What a host is told to do. Every order is idempotent: it may arrive again after a lost connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
pub enum Order {
    /// About a VM.
    Vm(Box<VmOrder>),
    /// About a template.
    Template(TemplateOrder),
    /// What a port lets through from now on.
    Port(Box<PortOrder>),
    /// A word of the other agent about a hand-over, where their own connection is cut.
    Relay(Relay),
    /// Another host may fetch blobs from this one. Not kept and not answered: who does not get them there gets them elsewhere.
    Lend(Lend),
}

/// What a host is told to do with a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmOrder {
    /// Which leader says so.
    pub epoch: Epoch,
    /// The VM.
    pub vm: VmId,
    /// Under which generation.
    pub generation: Generation,
    /// Its number. Not greater than the last: answered from the journal, not executed.
    pub revision: Revision,
    /// On behalf of which operation.
    pub operation: OperationId,
    /// What to do.
    pub verb: Verb,
}

/// What to do with a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum Verb {
    /// Make what is missing (volumes, port), and start it.
    Start {
        /// All that is needed to build it.
        definition: Box<Definition>,
        /// Make it stand at its first instruction.
        paused: bool,
        /// What its guest is told at its first start, where its layout has a seed. It may hold secrets: neither the outbox nor a
        /// host's journal has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seed: Option<Box<GuestSeed>>,
    },
    /// Ask the guest to power off; after the grace, end it.
    Stop {
        /// How long the guest may take.
        grace: Millis,
    },
    /// End it at once.
    Kill,
    /// Reset it.
    Reboot,
    /// Make it stand.
    Pause,
    /// Let it run again.
    Resume,
    /// End it if it runs, and delete its volumes and all that is left of it here.
    Remove {
        /// Its volumes.
        volumes: Vec<VolumePlace>,
    },
    /// Prepare to receive it.
    Receive {
        /// The terms.
        terms: Terms,
        /// All that is needed to build the container that waits for it.
        definition: Box<Definition>,
    },
    /// Send it.
    Send {
        /// The terms.
        terms: Terms,
        /// Where the destination's tunnel listens.
        to: Endpoint,
    },
    /// Give the hand-over up, if it can still be.
    Cancel {
        /// Under these terms.
        terms: Terms,
    },
}

impl Verb {
    /// Its name, for logs and messages.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Start { .. } => "start",
            Self::Stop { .. } => "stop",
            Self::Kill => "kill",
            Self::Reboot => "reboot",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Remove { .. } => "remove",
            Self::Receive { .. } => "receive",
            Self::Send { .. } => "send",
            Self::Cancel { .. } => "cancel",
        }
    }
}

/// Where a destination listens, for the tunnel and for its agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its address.
    pub address: std::net::IpAddr,
    /// Port of this migration's tunnel.
    pub tunnel_port: u16,
    /// Port of its agent, for the hand-over's messages.
    pub peer_port: u16,
}

/// All that is needed to build a VM on a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// The VM.
    pub vm: VmId,
    /// Its name, for the guest and for people who look at processes.
    pub name: Name,
    /// Its exact hardware.
    pub layout: Layout,
    /// How it starts.
    pub boot: Boot,
    /// The pool that holds the boot blobs and the bases of its volumes.
    pub pool: PoolId,
    /// Its disks.
    pub volumes: Vec<VolumeUse>,
    /// Its network cards.
    pub ports: Vec<PortUse>,
    /// The template's blobs and where they can be had, for a pool that may lack them; absent from older controllers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateSource>,
}

/// A template's blobs, and who has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateSource {
    /// The template's name, for people who watch.
    pub name: Name,
    /// All its blobs.
    pub blobs: Vec<Blob>,
    /// Hosts that have all of them and were told to lend them, the first to be asked first; then the controller.
    pub holders: Vec<Holder>,
}

/// A host that lends blobs: where its agent listens for other agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The host.
    pub host: HostId,
    /// Its address.
    pub address: std::net::IpAddr,
    /// Port of its agent.
    pub peer_port: u16,
}

/// Which blobs one host lends to another. Without it no host says which blobs it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lend {
    /// Which leader says so.
    pub epoch: Epoch,
    /// The template that they belong to.
    pub template: TemplateId,
    /// The pool that they lie in.
    pub pool: PoolId,
    /// To whom.
    pub to: HostId,
    /// The blobs.
    pub blobs: Vec<Digest>,
}

/// Where a volume lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumePlace {
    /// The volume.
    pub volume: VolumeId,
    /// Its pool.
    pub pool: PoolId,
    /// Its format.
    pub format: Format,
}

/// A disk of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeUse {
    /// Which, and where.
    pub place: VolumePlace,
    /// Size, bytes.
    pub size_bytes: u64,
    /// The blob it is an overlay of.
    pub base: Option<VolumeBase>,
}

/// What a volume is an overlay of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeBase {
    /// The blob.
    pub digest: Digest,
    /// Its format.
    pub format: Format,
}

/// A network card of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortUse {
    /// Its port.
    pub port: PortId,
    /// Its hardware address.
    pub mac: Mac,
    /// Its address.
    pub ip: Ipv4Addr,
    /// Prefix length of its subnet.
    pub prefix: u8,
    /// The way out.
    pub gateway: Option<Ipv4Addr>,
    /// Largest packet, bytes.
    pub mtu: u16,
    /// Its IPv6 address, with a prefix of 64 bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<Ipv6Addr>,
    /// What its guest is told beside its addresses, and how.
    #[serde(default)]
    pub addressing: Addressing,
    /// What it lets through.
    #[serde(default, skip_serializing_if = "PortPolicy::is_plain")]
    pub policy: PortPolicy,
}

/// What a port of a VM that is on a host, or on its way to it, lets through. The newest revision counts, in whatever order they come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortOrder {
    /// Which leader says so.
    pub epoch: Epoch,
    /// The VM.
    pub vm: VmId,
    /// The port, with its policy.
    pub port: PortUse,
}

/// What became of an order about a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortReport {
    /// The port.
    pub port: PortId,
    /// The policy's revision.
    pub revision: Revision,
    /// `None` when it is in force, or will be as soon as the port is there.
    pub refused: Option<Refusal>,
}

/// What a host is told to do with a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateOrder {
    /// Which leader says so.
    pub epoch: Epoch,
    /// On behalf of which operation.
    pub operation: OperationId,
    /// The template.
    pub template: TemplateId,
    /// The pool.
    pub pool: PoolId,
    /// What to do.
    pub verb: TemplateVerb,
}

/// What to do with a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum TemplateVerb {
    /// Fetch its blobs from the controller into the pool, and vet its disk.
    Fetch {
        /// What it holds.
        content: Content,
    },
    /// Delete these blobs from the pool.
    Drop {
        /// Blobs that no other template has.
        blobs: Vec<Digest>,
        /// The same for further pools of this host.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        others: Vec<PoolBlobs>,
    },
}

/// Blobs of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolBlobs {
    /// The pool.
    pub pool: PoolId,
    /// The blobs.
    pub blobs: Vec<Digest>,
}

/// A word of one agent to the other about a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relay {
    /// The VM.
    pub vm: VmId,
    /// Names the terms: generations are never given twice.
    pub granted: Generation,
    /// Who says it.
    pub from: HostId,
    /// To whom.
    pub to: HostId,
    /// What.
    pub message: Message,
}

/// What a host tells. Reports are numbered by the connection, resent until acknowledged, and may arrive twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum Report {
    /// What the host is and offers.
    Facts(Box<HostFacts>),
    /// All VMs that the agent knows, after it connected.
    Inventory {
        /// Each once.
        vms: Vec<VmObserved>,
    },
    /// A part of them, where all together would be too long for one message. Parts may be lost: each says alone what it covers.
    InventoryPart {
        /// Those with an id above `after`, up to and with `up_to`, in order, each once.
        vms: Vec<VmObserved>,
        /// `None`: from the first on.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<VmId>,
        /// `None`: to the last.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        up_to: Option<VmId>,
    },
    /// Something happened to a VM.
    Vm(Box<VmReport>),
    /// A template's blobs are there, gone, or refused.
    Template(TemplateReport),
    /// A port's policy is in force, or refused.
    Port(PortReport),
    /// How far an operation is. Telemetry: not stored, not resent.
    Progress {
        /// The operation.
        operation: OperationId,
        /// How far.
        progress: Progress,
    },
    /// A word for another agent.
    Relay(Relay),
}

/// Something happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// The VM.
    pub vm: VmId,
    /// The generation under which the host holds it, or held it.
    pub generation: Generation,
    /// The order that this answers, or the last one seen.
    pub revision: Revision,
    /// On behalf of which operation, if of any.
    pub operation: Option<OperationId>,
    /// What happened.
    pub what: Happening,
}

/// What happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Happening {
    /// It runs.
    Running,
    /// It stands, in memory.
    Paused,
    /// It is off.
    Off {
        /// Why.
        cause: OffCause,
    },
    /// It was reset.
    Rebooted,
    /// Nothing of it is left here.
    Removed,
    /// The order could not be done; the VM is as it was.
    Refused {
        /// Why.
        reason: Refusal,
    },
    /// Destination: a container waits for it.
    Receiving {
        /// Where its tunnel listens.
        tunnel_port: u16,
    },
    /// Source: memory is being copied.
    Copying,
    /// Source: the guest stands, the rest is being copied.
    Stopped,
    /// Source: authority is given up.
    Released,
    /// Destination: it is here for good, running or paused as its user wanted.
    Activated {
        /// When its guest ran here, by this host's wall clock, ms since 1970; `None` when it stands, or after a restart.
        resumed_at_ms: Option<i64>,
    },
    /// Destination: it will never be here under these terms.
    Voided {
        /// Why.
        reason: String,
    },
    /// Source: it kept the VM, which was never released.
    Kept {
        /// Why.
        reason: Refusal,
    },
    /// Source: it has the VM back after the destination's `void`.
    Reclaimed {
        /// Why.
        reason: String,
    },
    /// Source: nothing of it is left here.
    TornDown {
        /// What the source measured.
        receipt: Box<Receipt>,
        /// When its guest stood, by this host's wall clock, ms since 1970; `None` after a restart.
        stopped_at_ms: Option<i64>,
    },
    /// Both: who has it cannot be known from this host's journal; nothing may run before both hosts were fenced or rebooted.
    Unknown {
        /// Why.
        reason: String,
    },
    /// Source: a cancel came after the release.
    TooLate,
}

/// Why a VM is off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "kebab-case")]
pub enum OffCause {
    /// The guest powered itself off.
    Guest,
    /// An order.
    Ordered,
    /// Its process died.
    Died {
        /// What is known of it.
        detail: String,
    },
    /// Its host rebooted or lost power.
    HostRebooted,
}

/// A VM as an agent knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmObserved {
    /// The VM.
    pub vm: VmId,
    /// The generation under which it is, or was, held here.
    pub generation: Generation,
    /// The last order seen.
    pub revision: Revision,
    /// What it is now, as its last report would say it.
    pub what: Happening,
}

/// What became of an order about a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateReport {
    /// The operation.
    pub operation: OperationId,
    /// The template.
    pub template: TemplateId,
    /// The pool.
    pub pool: PoolId,
    /// `None` when it is done.
    pub refused: Option<Refusal>,
    /// After a fetch: what the template holds now. An imported disk is converted, so its blob is another one.
    #[serde(default)]
    pub content: Option<Box<Content>>,
}

impl Order {
    /// What the outbox keeps one order for.
    #[must_use]
    pub fn subject(&self) -> Subject {
        match self {
            Self::Vm(order) => Subject::Vm(order.vm),
            Self::Template(order) => Subject::Template(order.template),
            Self::Port(order) => Subject::Port(order.port.port),
            Self::Relay(relay) => Subject::Vm(relay.vm),
            Self::Lend(lend) => Subject::Template(lend.template),
        }
    }
}

/// What the outbox keeps one order for: the newest wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// A VM.
    Vm(VmId),
    /// A template.
    Template(TemplateId),
    /// A port.
    Port(PortId),
}
