//! What people ask for.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    Actor, HostId, Millis, Name, Operation, RequestId, Revision, Role, Timestamp, TokenId, VmId,
    access::{JoinToken, PasswordHash, Quota, TokenHash},
    addressing::Addressing,
    audit::AuditNote,
    layout::Family,
    name::Reference,
    policy::{Cidr, NewRule, RateLimit},
    seed::UserData,
    template::Content,
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
    /// Make a project. Legal when its name is free.
    CreateProject {
        /// Its name.
        name: Name,
        /// What its VMs may hold at most.
        quota: Quota,
    },
    /// Delete a project, with its service tokens and what users were granted in it. Legal when nothing is in it; never for `default`.
    DeleteProject(Reference),
    /// Bound what a project's VMs may hold. What they hold already stays.
    SetQuota {
        /// Which.
        project: Reference,
        /// What they may hold at most.
        quota: Quota,
    },
    /// Say what guests of a network are told beside their IPv4 addresses, and how. Its IPv6 prefix may change only while it has no ports.
    /// VMs that run learn the rest when they start again or move.
    SetAddressing {
        /// Which.
        network: Reference,
        /// What they are told.
        addressing: Addressing,
    },
    /// Make a user, who may do nothing yet. Legal when the name is free.
    CreateUser {
        /// Its name.
        name: Name,
        /// What its password is checked against.
        password: PasswordHash,
    },
    /// Change a password, and end the user's other sessions. Legal for oneself and for cloud admins.
    SetPassword {
        /// Whose.
        user: Reference,
        /// What it is checked against from now on.
        password: PasswordHash,
    },
    /// Keep a user out, sessions and tokens at once, or let it in again. Legal when a cloud admin remains.
    SetUserDisabled {
        /// Whom.
        user: Reference,
        /// Whether it may not come in.
        disabled: bool,
    },
    /// Delete a user with its sessions and tokens. Legal when a cloud admin remains.
    DeleteUser(Reference),
    /// Let a user do something in the actor's project, in place of what it may do there; or everything, as a cloud admin. Legal for
    /// what the actor may do itself.
    Grant {
        /// Whom.
        user: Reference,
        /// What.
        role: Role,
    },
    /// Take a user's role in the actor's project away, or that of a cloud admin. Legal when a cloud admin remains.
    Revoke {
        /// Whose.
        user: Reference,
        /// Whether it is the cloud admin's role that goes.
        cloud_admin: bool,
    },
    /// Make a service token of the actor's project. Its text is made by the edge; only its hash comes here.
    CreateToken(NewToken),
    /// End a token. Legal for one's own, and for service tokens of the project that one administers.
    RevokeToken(TokenId),
    /// Begin a session of a user whose password the controller has checked.
    OpenSession {
        /// Whose.
        user: Reference,
        /// What it was checked against: if it was changed meanwhile, the check counts for nothing.
        password: PasswordHash,
        /// The token.
        id: TokenId,
        /// Hash of its secret.
        hash: TokenHash,
        /// How long it is valid.
        valid: Millis,
    },
    /// Make a security group, which allows its ports to begin what they like. Legal when its name is free.
    CreateSecurityGroup {
        /// Its name.
        name: Name,
    },
    /// Delete a security group. Legal when no port is in it and no rule speaks of it.
    DeleteSecurityGroup(Reference),
    /// Add a rule to a group, at once for all its ports.
    AddSecurityRule {
        /// Which group.
        group: Reference,
        /// What it allows.
        rule: NewRule,
    },
    /// Take a rule away, at once for all the group's ports.
    RemoveSecurityRule {
        /// Which group.
        group: Reference,
        /// The rule's number.
        number: u32,
    },
    /// Change what a port lets through, at once.
    SetPort {
        /// Which: its id, or the VM that has no other.
        port: Reference,
        /// What becomes different.
        change: Box<PortChange>,
    },
    /// Write something into the audit log that no other command stands for. The controller's own.
    Note(AuditNote),
}

/// A service token to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewToken {
    /// Its id.
    pub id: TokenId,
    /// Hash of its secret.
    pub hash: TokenHash,
    /// What people call it.
    pub name: Name,
    /// What it may do in the actor's project: at most what the actor may.
    pub role: Role,
    /// When it stops being valid; `None` never. Not after the token that asks for it, unless that is a session's.
    pub expires_at: Option<Timestamp>,
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
            Self::CreateVm(_)
            | Self::DeleteVm(_)
            | Self::CreateTemplate { .. }
            | Self::DeleteTemplate(_)
            | Self::SetAddressing { .. }
            | Self::CreateSecurityGroup { .. }
            | Self::DeleteSecurityGroup(_)
            | Self::AddSecurityRule { .. }
            | Self::RemoveSecurityRule { .. }
            | Self::SetPort { .. } => Role::ProjectAdmin,
            Self::AddJoinToken(_)
            | Self::JoinHost { .. }
            | Self::SetSchedulable { .. }
            | Self::RemoveHost(_)
            | Self::AbandonHost(_)
            | Self::CreateProject { .. }
            | Self::DeleteProject(_)
            | Self::SetQuota { .. }
            | Self::CreateUser { .. }
            | Self::SetUserDisabled { .. }
            | Self::DeleteUser(_)
            | Self::OpenSession { .. } => Role::CloudAdmin,
            Self::Grant { role, .. } => match role {
                Role::CloudAdmin => Role::CloudAdmin,
                _ => Role::ProjectAdmin,
            },
            Self::Revoke { cloud_admin, .. } => match cloud_admin {
                true => Role::CloudAdmin,
                false => Role::ProjectAdmin,
            },
            Self::CreateToken(token) => match token.role {
                Role::CloudAdmin => Role::CloudAdmin,
                _ => Role::ProjectAdmin,
            },
            // Whose password and whose token it is decides more.
            Self::SetPassword { .. } | Self::RevokeToken(_) | Self::Note(_) => Role::Viewer,
        }
    }

    /// What the audit log calls it: stable, dotted.
    #[must_use]
    pub const fn action(&self) -> &'static str {
        match self {
            Self::CreateVm(_) => "vm.create",
            Self::StartVm(_) => "vm.start",
            Self::StopVm { .. } => "vm.stop",
            Self::KillVm(_) => "vm.kill",
            Self::RebootVm(_) => "vm.reboot",
            Self::PauseVm(_) => "vm.pause",
            Self::ResumeVm(_) => "vm.resume",
            Self::DeleteVm(_) => "vm.delete",
            Self::MigrateVm { .. } => "vm.migrate",
            Self::CancelOperation(_) => "operation.cancel",
            Self::AddJoinToken(_) => "host.add-token",
            Self::JoinHost { .. } => "host.join",
            Self::SetSchedulable { .. } => "host.set-schedulable",
            Self::RemoveHost(_) => "host.remove",
            Self::AbandonHost(_) => "host.abandon",
            Self::CreateTemplate { .. } => "template.create",
            Self::DeleteTemplate(_) => "template.delete",
            Self::CreateProject { .. } => "project.create",
            Self::DeleteProject(_) => "project.delete",
            Self::SetQuota { .. } => "project.set-quota",
            Self::SetAddressing { .. } => "network.set-addressing",
            Self::CreateUser { .. } => "user.create",
            Self::SetPassword { .. } => "user.set-password",
            Self::SetUserDisabled { disabled: true, .. } => "user.disable",
            Self::SetUserDisabled { .. } => "user.enable",
            Self::DeleteUser(_) => "user.delete",
            Self::Grant { .. } => "user.grant",
            Self::Revoke { .. } => "user.revoke",
            Self::CreateToken(_) => "token.create",
            Self::RevokeToken(_) => "token.revoke",
            Self::OpenSession { .. } => "session.login",
            Self::CreateSecurityGroup { .. } => "security-group.create",
            Self::DeleteSecurityGroup(_) => "security-group.delete",
            Self::AddSecurityRule { .. } => "security-group.add-rule",
            Self::RemoveSecurityRule { .. } => "security-group.remove-rule",
            Self::SetPort { .. } => "port.set",
            Self::Note(note) => note.action,
        }
    }

    /// The thing that it is about, for the audit log: a name or id, and a role where one is given. Never a secret.
    #[must_use]
    pub fn target(&self) -> String {
        match self {
            Self::CreateVm(wanted) => wanted.name.to_string(),
            Self::StartVm(of)
            | Self::StopVm { vm: of, .. }
            | Self::KillVm(of)
            | Self::RebootVm(of)
            | Self::PauseVm(of)
            | Self::ResumeVm(of)
            | Self::DeleteVm(of)
            | Self::MigrateVm { vm: of, .. }
            | Self::SetSchedulable { host: of, .. }
            | Self::RemoveHost(of)
            | Self::AbandonHost(of)
            | Self::DeleteTemplate(of)
            | Self::DeleteProject(of)
            | Self::SetQuota { project: of, .. }
            | Self::SetAddressing { network: of, .. }
            | Self::SetPassword { user: of, .. }
            | Self::SetUserDisabled { user: of, .. }
            | Self::DeleteUser(of)
            | Self::OpenSession { user: of, .. }
            | Self::DeleteSecurityGroup(of)
            | Self::AddSecurityRule { group: of, .. }
            | Self::SetPort { port: of, .. } => of.to_string(),
            Self::RemoveSecurityRule { group, number } => format!("{group} {number}"),
            Self::Grant { user, role } => format!("{user} {role}"),
            Self::Revoke {
                user,
                cloud_admin: true,
            } => format!("{user} {}", Role::CloudAdmin),
            Self::Revoke { user, .. } => user.to_string(),
            Self::CancelOperation(id) => id.to_string(),
            Self::AddJoinToken(token) => token.id.to_string(),
            Self::JoinHost { name, .. }
            | Self::CreateTemplate { name, .. }
            | Self::CreateProject { name, .. }
            | Self::CreateUser { name, .. }
            | Self::CreateSecurityGroup { name } => name.to_string(),
            Self::CreateToken(token) => format!("{} {} {}", token.name, token.role, token.id),
            Self::RevokeToken(id) => id.to_string(),
            Self::Note(note) => note.target.clone(),
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
    /// Its guest's host name; `None` is the VM's name. Only for templates whose guests take a seed, as what follows.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Public keys of the people who may log in, each a line as in a `.pub` file; at most 32.
    #[serde(default)]
    pub ssh_keys: Vec<String>,
    /// What cloud-init does at the guest's first start, at most 64 KiB. A secret: it is never told again.
    #[serde(default)]
    pub user_data: Option<UserData>,
    /// Security groups of its port; none: it is not filtered.
    #[serde(default)]
    pub security_groups: Vec<Reference>,
    /// Addresses beyond its own from which its guest may send: for routers and shared addresses.
    #[serde(default)]
    pub allow_addresses: Vec<Cidr>,
}

/// What becomes different at a port; what is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PortChange {
    /// Whether its link is held down.
    pub link_down: Option<bool>,
    /// Its security groups, in place of those that it has.
    pub security_groups: Option<Vec<Reference>>,
    /// Addresses beyond its own from which its guest may send, in place of those.
    pub allow_addresses: Option<Vec<Cidr>>,
    /// How much its guest may be sent.
    pub to_guest: Option<LimitChange>,
    /// How much its guest may send.
    pub from_guest: Option<LimitChange>,
}

/// A limit, or that there is none from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LimitChange {
    /// Nothing is held back.
    None,
    /// Not more than this.
    Limit(RateLimit),
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
