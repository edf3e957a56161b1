//! Who asks, for which project, with what right.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Name, ProjectId, Timestamp, TokenId, UserId};

/// A tenant: every VM, volume, network and operation belongs to one. Project `default` always exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// Its name, unique in the cell.
    pub name: Name,
    /// What its VMs may hold at most.
    #[serde(default)]
    pub quota: Quota,
    /// What its VMs hold; changed in the transaction that creates or deletes them.
    #[serde(default)]
    pub used: Usage,
}

/// Upper bounds of a project; `None` is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// VMs that exist.
    pub vms: Option<u64>,
    /// Sum of their vCPUs.
    pub vcpus: Option<u64>,
    /// Sum of their memory, MiB.
    pub memory_mib: Option<u64>,
    /// Sum of their disks' sizes as guests see them, bytes.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
}

/// What a project's VMs hold, running or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// VMs that exist.
    pub vms: u64,
    /// Sum of their vCPUs.
    pub vcpus: u64,
    /// Sum of their memory, MiB.
    pub memory_mib: u64,
    /// Sum of their disks' sizes as guests see them, bytes.
    #[serde(default)]
    pub disk_bytes: u64,
}

/// What a subject may do; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Reads its project.
    Viewer,
    /// Starts, stops and moves VMs of its project.
    Operator,
    /// Creates and deletes in its project.
    ProjectAdmin,
    /// Everything: hosts, templates, users, all projects.
    CloudAdmin,
}

impl Role {
    /// Its name for people and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::ProjectAdmin => "project-admin",
            Self::CloudAdmin => "cloud-admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Who asks. Every call to the controller's handle carries one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Actor {
    /// The person or service, as its token names it.
    pub subject: String,
    /// The project it speaks for.
    pub project: ProjectId,
    /// Its right there.
    pub role: Role,
    /// How it came; empty for the controller itself.
    #[serde(skip)]
    pub via: Via,
}

/// How an actor came: what its right rests on, and from where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Via {
    /// The user whose right it uses, if it is one's.
    pub user: Option<UserId>,
    /// The token that was shown.
    pub token: Option<TokenId>,
    /// The address that the request came from.
    pub remote: Option<IpAddr>,
}

/// SHA-256 of a token's secret. The secret itself is shown once and kept nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenHash(pub [u8; 32]);

/// Lets one host join the cell, once, before it expires.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// Its id, part of the token's text.
    pub id: TokenId,
    /// Hash of its secret.
    pub hash: TokenHash,
    /// When it stops being valid.
    pub expires_at: Timestamp,
    /// Who made it.
    pub created_by: String,
}

/// What a token is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TokenKind {
    /// A program's: it speaks for one project with a role that was fixed when it was made.
    #[default]
    Service,
    /// A login's: it speaks for its user, in whatever project the user has a role.
    Session,
}

impl TokenKind {
    /// Its name for people and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Session => "session",
        }
    }
}

/// Lets a client use the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiToken {
    /// Its id.
    pub id: TokenId,
    /// Hash of its secret.
    pub hash: TokenHash,
    /// Whom it speaks for: the most that it may, for what its owner may still do is asked each time.
    pub actor: Actor,
    /// When it stops being valid; `None` never.
    pub expires_at: Option<Timestamp>,
    /// What people call it; unique in its project among service tokens that have one.
    #[serde(default)]
    pub name: Option<Name>,
    /// What it is for.
    #[serde(default)]
    pub kind: TokenKind,
    /// The user whose right it uses: it ends with the user, and is never worth more. `None`: the first administrator's.
    #[serde(default)]
    pub owner: Option<UserId>,
    /// Who made it.
    #[serde(default)]
    pub created_by: String,
    /// When it was made; `None` before that was noted.
    #[serde(default)]
    pub created_at: Option<Timestamp>,
}

/// An argon2id hash in its PHC string form. It is stored, and shown to nobody.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PasswordHash(pub String);

impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordHash(..)")
    }
}

/// A person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Its id.
    pub id: UserId,
    /// Its name, unique in the cell.
    pub name: Name,
    /// What its password is checked against.
    pub password: PasswordHash,
    /// Whether it may do everything, in all projects.
    #[serde(default)]
    pub cloud_admin: bool,
    /// What it may do in which project; never cloud admin, which is said above.
    #[serde(default)]
    pub grants: BTreeMap<ProjectId, Role>,
    /// Whether it may not come in for now.
    #[serde(default)]
    pub disabled: bool,
    /// When it was made.
    pub created_at: Timestamp,
}

impl User {
    /// What it may do in a project; `None`: it may not even know of it.
    #[must_use]
    pub fn role_in(&self, project: ProjectId) -> Option<Role> {
        match self {
            Self { disabled: true, .. } => None,
            Self { cloud_admin: true, .. } => Some(Role::CloudAdmin),
            _ => self.grants.get(&project).copied(),
        }
    }
}

impl ApiToken {
    /// What it is worth in a project now, `owner` being the user that owns it; `None`: nothing. The one place where that is decided:
    /// asked when a request comes in, and again in the transaction that it leads to.
    #[must_use]
    pub fn role_in(&self, project: ProjectId, owner: Option<&User>, now: Timestamp) -> Option<Role> {
        if self.expires_at.is_some_and(|end| now >= end) {
            return None;
        }
        let everywhere = self.kind == TokenKind::Session || self.actor.role == Role::CloudAdmin;
        let most = (everywhere || project == self.actor.project).then_some(self.actor.role)?;
        match self.owner {
            None => Some(most),
            Some(_) => owner?.role_in(project).map(|role| role.min(most)),
        }
    }
}
