//! What people ask for.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    Actor, HostId, Millis, Name, Operation, RequestId, Revision, Role, VmId, access::JoinToken, layout::Family,
    name::Reference, template::Content,
};

/// A request as it reaches the engine: all that a decision needs, ids included.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its id, to find the one who waits.
    pub id: RequestId,
    /// Who asks.
    pub actor: Actor,
    /// For what.
    pub command: Command,
    /// Makes a repeated request the same request.
    pub key: Option<IdempotencyKey>,
    /// Do it only if the thing still has this revision (If-Match).
    pub expect: Option<Revision>,
    /// Say what would be done, and do nothing.
    pub dry_run: bool,
    /// Fresh UUIDv7s, [`Request::FRESH`] of them, for what the request makes.
    pub fresh: Vec<Uuid>,
}

impl Request {
    /// How many fresh ids a request brings.
    pub const FRESH: usize = 40;
}

/// Makes a repeated request the same request: unique in the project for a day.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// The client's text, 1 to 255 visible ASCII characters.
    pub key: String,
    /// SHA-256 of the request, to refuse the key with another body.
    pub body_hash: [u8; 32],
}

/// What people ask for. A closed list: each variant says when it is legal, the engine refuses it by name otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Make a VM. Legal when its name is free.
    CreateVm(CreateVm),
    /// Start a VM. Legal when inactive or failed; done when active.
    StartVm(Reference),
    /// Ask the guest to power off, then make it. Legal when active or paused; done when inactive.
    StopVm {
        /// Which.
        vm: Reference,
        /// How long the guest may take.
        grace: Millis,
    },
    /// End it at once. Legal when provisioning, active or paused; done when inactive.
    KillVm(Reference),
    /// Reset it. Legal when active.
    RebootVm(Reference),
    /// Make it stand. Legal when active; done when paused.
    PauseVm(Reference),
    /// Let it run again. Legal when paused; done when active.
    ResumeVm(Reference),
    /// Delete it with its disks. Legal when no operation holds it.
    DeleteVm(Reference),
    /// Move it while it runs. Legal when active or paused.
    MigrateVm {
        /// Which.
        vm: Reference,
        /// Where to; `None` lets the engine choose.
        to: Option<Reference>,
    },
    /// Give an operation up. Legal while it runs.
    CancelOperation(crate::OperationId),
    /// Let one host join. The token's text is made by the edge; only its hash comes here.
    AddJoinToken(JoinToken),
    /// A host joins with a token that the controller has checked.
    JoinHost {
        /// The token.
        token: crate::TokenId,
        /// The host's id, which its certificate will carry.
        host: HostId,
        /// The name it would like.
        name: Name,
    },
    /// Offer a host for new VMs, or stop doing so.
    SetSchedulable {
        /// Which.
        host: Reference,
        /// Whether.
        schedulable: bool,
    },
    /// Remove a host. Legal when no VM is on it.
    RemoveHost(Reference),
    /// Remove a lost host with whatever was on it. A person vouches that its machine is off and stays off: what it held in memory is
    /// lost, and VMs whose disks others see may be started there.
    AbandonHost(Reference),
    /// Make a template of blobs that the controller has.
    CreateTemplate {
        /// Its name.
        name: Name,
        /// What it holds.
        content: Content,
    },
    /// Delete a template. Legal when no VM is made from it.
    DeleteTemplate(Reference),
}

impl Command {
    /// The least role that may ask for it.
    #[must_use]
    pub const fn needs(&self) -> Role {
        match self {
            Self::StartVm(_)
            | Self::StopVm { .. }
            | Self::KillVm(_)
            | Self::RebootVm(_)
            | Self::PauseVm(_)
            | Self::ResumeVm(_)
            | Self::MigrateVm { .. }
            | Self::CancelOperation(_) => Role::Operator,
            Self::CreateVm(_) | Self::DeleteVm(_) | Self::CreateTemplate { .. } | Self::DeleteTemplate(_) => {
                Role::ProjectAdmin
            }
            Self::AddJoinToken(_)
            | Self::JoinHost { .. }
            | Self::SetSchedulable { .. }
            | Self::RemoveHost(_)
            | Self::AbandonHost(_) => Role::CloudAdmin,
        }
    }
}

/// A VM to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// Its name.
    pub name: Name,
    /// What it is made from.
    pub template: Reference,
    /// vCPUs, 1 to 64.
    #[serde(default = "one")]
    pub vcpus: u16,
    /// Memory, MiB, 64 to 1 Ti.
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u64,
    /// Size of its first disk, bytes; `None` is the template's. Not below the template's.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
    /// Machine family.
    #[serde(default)]
    pub family: Family,
    /// Its network; `None` is `default`.
    #[serde(default)]
    pub network: Option<Reference>,
    /// Its host; `None` lets the engine choose.
    #[serde(default)]
    pub host: Option<Reference>,
    /// Its pool; `None` lets the engine choose.
    #[serde(default)]
    pub pool: Option<Reference>,
    /// Start it.
    #[serde(default = "yes")]
    pub start: bool,
}

const fn one() -> u16 {
    1
}

const fn default_memory_mib() -> u64 {
    512
}

const fn yes() -> bool {
    true
}

/// What a request led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Work that goes on, or that is already done.
    Operation(Box<Operation>),
    /// What would be done.
    Plan(Plan),
    /// It is done; there is nothing to tell.
    Done,
}

/// A decision of placement, explained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// The VM, if it exists.
    pub vm: Option<VmId>,
    /// The chosen host; `None` when no host will do.
    pub host: Option<HostId>,
    /// Its name.
    pub host_name: Option<Name>,
    /// Every host, why not or how good.
    pub hosts: Vec<HostVerdict>,
}

/// What placement says of one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostVerdict {
    /// The host.
    pub host: HostId,
    /// Its name.
    pub name: Name,
    /// Why not, each with the smallest change that would allow it; empty when it will do.
    pub refused: Vec<String>,
    /// How good it is, higher is better; 0 to 1000.
    pub score: u32,
}
