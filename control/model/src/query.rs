//! What people read.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    Host, HostId, Name, Network, Operation, OperationId, Pool, Port, Project, ProjectId, Revision, Role, SecurityGroup,
    SecurityGroupId, Subnet, Template, TemplateId, Timestamp, TokenId, UserId, VmId, VmSpec, VmStatus, Volume,
    access::TokenKind, layout::Layout, name::Reference, operation::Progress, policy::Traffic,
};

/// A read of the committed world, within the actor's project.
#[derive(Clone, Debug)]
pub enum Query {
    /// A page of VMs.
    Vms(Page),
    /// One VM.
    Vm(Reference),
    /// A page of hosts.
    Hosts(Page),
    /// One host.
    Host(Reference),
    /// A page of templates.
    Templates(Page),
    /// One template.
    Template(Reference),
    /// A page of operations, the newest first.
    Operations(Page),
    /// One operation.
    Operation(OperationId),
    /// A page of networks.
    Networks(Page),
    /// A page of pools.
    Pools(Page),
    /// A page of volumes.
    Volumes(Page),
    /// A page of the projects in which the actor has a role.
    Projects(Page),
    /// One of them.
    Project(Reference),
    /// A page of users: of the project; for a cloud admin, all.
    Users(Page),
    /// One of them, or oneself.
    User(Reference),
    /// A page of the project's service tokens.
    Tokens(Page),
    /// The token that the actor showed.
    OwnToken,
    /// A page of the project's ports.
    Ports(Page),
    /// One of them: its id, or the VM that has no other.
    Port(Reference),
    /// A page of the project's security groups.
    SecurityGroups(Page),
    /// One of them.
    SecurityGroup(Reference),
}

impl Query {
    /// The least role that may ask it.
    #[must_use]
    pub const fn needs(&self) -> Role {
        match self {
            Self::Users(_) | Self::Tokens(_) => Role::ProjectAdmin,
            _ => Role::Viewer,
        }
    }
}

/// Which part of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// At most this many, 1 to [`Page::LIMIT_MAX`].
    pub limit: usize,
    /// After this id.
    pub after: Option<Uuid>,
}

impl Page {
    /// Most items of a page.
    pub const LIMIT_MAX: usize = 1000;
}

/// An answer to a [`Query`].
#[derive(Clone, Debug)]
pub enum View {
    /// VMs.
    Vms(Listing<VmView>),
    /// A VM.
    Vm(Box<VmView>),
    /// Hosts.
    Hosts(Listing<HostView>),
    /// A host.
    Host(Box<HostView>),
    /// Templates.
    Templates(Listing<Template>),
    /// A template.
    Template(Box<Template>),
    /// Operations.
    Operations(Listing<OperationView>),
    /// An operation.
    Operation(Box<OperationView>),
    /// Networks.
    Networks(Listing<NetworkView>),
    /// Pools.
    Pools(Listing<Pool>),
    /// Volumes.
    Volumes(Listing<Volume>),
    /// Projects.
    Projects(Listing<Project>),
    /// A project.
    Project(Box<Project>),
    /// Users.
    Users(Listing<UserView>),
    /// A user.
    User(Box<UserView>),
    /// Tokens.
    Tokens(Listing<TokenView>),
    /// A token.
    Token(Box<TokenView>),
    /// Ports.
    Ports(Listing<PortView>),
    /// A port.
    Port(Box<PortView>),
    /// Security groups.
    SecurityGroups(Listing<SecurityGroupView>),
    /// A security group.
    SecurityGroup(Box<SecurityGroupView>),
}

/// Part of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Listing<T> {
    /// The items.
    pub items: Vec<T>,
    /// Where the next page begins; `None` when there is none.
    pub next: Option<Uuid>,
}

/// An id with the name that people know it by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Named<T> {
    /// The id.
    pub id: T,
    /// The name.
    pub name: Name,
}

/// A VM with what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// What people asked for.
    pub spec: VmSpec,
    /// Counts changes of the spec.
    pub revision: Revision,
    /// What is seen.
    pub status: VmStatus,
    /// Where it is or was last.
    pub host: Option<Named<HostId>>,
    /// Whether that host's agent is connected: if not, what is seen may be old.
    pub host_lost: bool,
    /// What it was made from.
    pub template: Option<Named<TemplateId>>,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Its volumes.
    pub volumes: Vec<Volume>,
    /// Its exact hardware.
    pub layout: Layout,
    /// The operation that holds it.
    pub operation: Option<OperationId>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// A host with what it carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostView {
    /// The host.
    #[serde(flatten)]
    pub host: Host,
    /// VMs that hold capacity on it.
    pub vms: u64,
    /// vCPUs they hold, and on offer.
    pub vcpus: Share,
    /// Memory they hold, and on offer, MiB.
    pub memory_mib: Share,
    /// Whether its agent has a session now. Its link is `up` for some seconds more after a controller's start, until a host that
    /// does not come again counts as lost; what is known of it may be old then.
    #[serde(default = "yes")]
    pub connected: bool,
}

/// Of controllers that did not tell.
const fn yes() -> bool {
    true
}

/// What is held of what is on offer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Share {
    /// Held.
    pub used: u64,
    /// On offer.
    pub offered: u64,
}

/// An operation with how far it is right now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperationView {
    /// The operation.
    #[serde(flatten)]
    pub operation: Operation,
    /// How far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// A network with its address ranges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkView {
    /// The network.
    #[serde(flatten)]
    pub network: Network,
    /// Its ranges.
    pub subnets: Vec<Subnet>,
    /// Addresses in use or resting.
    pub addresses_used: u64,
    /// Those of them that rest: their VM is gone, and they are given to another after a minute.
    #[serde(default)]
    pub addresses_resting: u64,
}

/// A user, as far as the one who reads may see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UserView {
    /// Its id.
    pub id: UserId,
    /// Its name.
    pub name: Name,
    /// Whether it may do everything, in all projects.
    pub cloud_admin: bool,
    /// What it may do in which project.
    pub grants: Vec<GrantView>,
    /// Whether it may not come in for now.
    pub disabled: bool,
    /// When it was made.
    pub created_at: Timestamp,
}

/// A role in a project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GrantView {
    /// The project.
    pub project: Named<ProjectId>,
    /// The role.
    pub role: Role,
}

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenView {
    /// Its id.
    pub id: TokenId,
    /// What people call it.
    pub name: Option<Name>,
    /// What it is for.
    pub kind: TokenKind,
    /// Whom it speaks for, as operations and the audit log name it.
    pub subject: String,
    /// The project that it speaks for.
    pub project: Option<Named<ProjectId>>,
    /// What it may do there at most.
    pub role: Role,
    /// The user whose right it uses.
    pub owner: Option<Named<UserId>>,
    /// Who made it.
    pub created_by: String,
    /// When it was made; `None` before that was noted.
    pub created_at: Option<Timestamp>,
    /// When it stops being valid; `None` never.
    pub expires_at: Option<Timestamp>,
}

/// A port with what it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortView {
    /// The port.
    #[serde(flatten)]
    pub port: Port,
    /// Its VM.
    pub vm_name: Option<Name>,
    /// Its network's name.
    pub network_name: Option<Name>,
    /// The name of the host on which its frames are let through.
    pub host_name: Option<Name>,
    /// Its security groups.
    pub security_groups: Vec<Named<SecurityGroupId>>,
    /// Whether what was asked of it is in force on its host, or its VM is off.
    pub in_force: bool,
    /// What went through it, as its host told last; `None` where nothing is known.
    pub traffic: Option<Traffic>,
}

/// A security group with who uses it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SecurityGroupView {
    /// The group.
    #[serde(flatten)]
    pub group: SecurityGroup,
    /// Names of the groups that its rules speak of.
    pub remote_groups: Vec<Named<SecurityGroupId>>,
    /// How many ports are in it.
    pub ports: u64,
}
