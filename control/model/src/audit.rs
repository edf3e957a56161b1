//! The audit log: who asked for what, from where, and what came of it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{Actor, AuditId, Code, OperationId, ProjectId, Timestamp, TokenId, UserId};

/// One request that reached a decision, or one login. Written in the transaction of its effect, never changed afterwards. It holds no
/// secret: neither passwords nor tokens, nor what was in a request's body beside the names of things.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// Its id.
    pub id: AuditId,
    /// When.
    pub at: Timestamp,
    /// Who, as the token names it; for a login that failed, the user name that was given.
    pub subject: String,
    /// The user whose right was used, if it was one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserId>,
    /// The token that was shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<TokenId>,
    /// In which project; `None` where none was chosen, as for a login.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectId>,
    /// From where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub remote: Option<IpAddr>,
    /// What was asked for, stable, dotted: `vm.create`, `user.grant`, `session.login`.
    pub action: String,
    /// Of which thing, as the request named it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub target: String,
    /// What came of it.
    pub result: AuditResult,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum AuditResult {
    /// It was accepted.
    Accepted {
        /// The work that it began, if it is any.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        operation: Option<OperationId>,
    },
    /// It was refused.
    Refused {
        /// Why.
        code: Code,
    },
}

/// What the controller notes of something that no command stands for: a login that failed, a console that was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditNote {
    /// What, as [`AuditEntry::action`].
    pub action: &'static str,
    /// Of which thing.
    pub target: String,
    /// Why it was refused, if it was.
    pub refused: Option<Code>,
    /// Whether it took place in the actor's project.
    pub in_project: bool,
}

/// Which entries are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditFilter {
    /// Those of this project.
    pub project: Option<ProjectId>,
    /// Those of this subject.
    pub subject: Option<String>,
    /// Those not before.
    pub from: Option<Timestamp>,
    /// Those before.
    pub until: Option<Timestamp>,
}

impl AuditId {
    /// The id of what happened at a time: the form of UUIDv7, told apart from others of that millisecond by `unique`'s own bits.
    #[must_use]
    pub fn at(at: Timestamp, unique: Uuid) -> Self {
        let mut bytes = *unique.as_bytes();
        let ms = u64::try_from(at.0).unwrap_or(0).to_be_bytes();
        bytes[..6].copy_from_slice(&ms[2..]);
        bytes[6] = bytes[6] & 0x0f | 0x70;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Self(Uuid::from_bytes(bytes))
    }

    /// When that happened, as the id has it.
    #[must_use]
    pub fn time(self) -> Timestamp {
        let ms = (self.0.as_u128() >> 80) & 0xffff_ffff_ffff;
        Timestamp(i64::try_from(ms).unwrap_or(i64::MAX))
    }

    /// Not above any id of what happens at or after a time, and above all before it.
    #[must_use]
    pub fn first_at(at: Timestamp) -> Self {
        let ms = u128::from(u64::try_from(at.0).unwrap_or(0)) & 0xffff_ffff_ffff;
        Self(Uuid::from_u128(ms << 80))
    }
}

impl AuditEntry {
    /// What an actor's request led to.
    #[must_use]
    pub fn of(actor: &Actor, at: Timestamp, unique: Uuid, action: &str, target: String, result: AuditResult) -> Self {
        Self {
            id: AuditId::at(at, unique),
            at,
            subject: actor.subject.clone(),
            user: actor.via.user,
            token: actor.via.token,
            project: Some(actor.project),
            remote: actor.via.remote,
            action: action.to_owned(),
            target,
            result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_entries_are_ordered_as_their_times() {
        let (early, late) = (Timestamp(1_700_000_000_000), Timestamp(1_700_000_000_001));
        let (low, high) = (Uuid::from_u128(1), Uuid::from_u128(u128::MAX));
        assert!(AuditId::at(early, high) < AuditId::at(late, low));
        assert!(AuditId::at(early, high) < AuditId::first_at(late));
        assert!(AuditId::first_at(late) < AuditId::at(late, low));
        assert_ne!(AuditId::at(early, high), AuditId::at(early, low));
        assert_eq!(AuditId::at(early, low).0.get_version_num(), 7);
        assert_eq!(AuditId::at(early, high).time(), early);
    }
}
