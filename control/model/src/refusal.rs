//! Why something was not done, in a form that a person and a program can act on.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

/// Stable codes of refusals. New ones may be added; the meaning of one never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// A value is outside what is allowed.
    InvalidInput,
    /// No or a wrong token.
    Unauthenticated,
    /// The token's role does not allow this.
    Forbidden,
    /// No such thing in the actor's project.
    NotFound,
    /// The name is taken in this project.
    NameTaken,
    /// Not legal in the thing's present state.
    WrongState,
    /// Another operation holds the thing.
    Busy,
    /// The thing changed since it was read (If-Match).
    Stale,
    /// The idempotency key was used with another body.
    KeyReused,
    /// A project's quota would be exceeded.
    QuotaExceeded,
    /// No host can take the VM.
    NoCapacity,
    /// The hosts cannot exchange this VM.
    Incompatible,
    /// Too late to cancel: the VM has changed hosts or is about to.
    TooLate,
    /// A host is not connected.
    HostUnreachable,
    /// A host tried and failed.
    HostFailed,
    /// The operation ran out of time.
    TimedOut,
    /// It was cancelled by a person.
    Cancelled,
    /// The store cannot write (full or failing disk).
    ReadOnly,
    /// The controller has as much to do as it takes; try again.
    Overloaded,
    /// Too many attempts to log in; wait.
    TooManyAttempts,
    /// A code of a newer version.
    #[serde(other)]
    Other,
}

/// A refusal: what failed and why, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize, ToSchema)]
#[error("{message}")]
pub struct Refusal {
    /// For programs.
    pub code: Code,
    /// What failed, on which thing, and why; one line.
    pub message: String,
    /// What to do next; one line, may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hint: String,
}

impl Refusal {
    /// A refusal without a hint.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: String::new(),
        }
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}
