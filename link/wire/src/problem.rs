//! The body of every refused HTTP request: `application/problem+json` (RFC 9457), with a stable code and what to do next.

use model::{OperationId, Refusal, refusal::Code};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The media type of [`Problem`].
pub const MEDIA_TYPE: &str = "application/problem+json";

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Names the kind of problem: `urn:godwit:problem:` and the code.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// The kind of problem in words.
    #[serde(default)]
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// For programs.
    pub code: Code,
    /// What failed, on which thing, and why.
    pub detail: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The operation that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
}

impl Problem {
    /// The HTTP form of a refusal.
    #[must_use]
    pub fn of(refusal: &Refusal, operation: Option<OperationId>) -> Self {
        let (status, name, title) = describe(refusal.code);
        Self {
            kind: format!("urn:godwit:problem:{name}"),
            title: title.to_owned(),
            status,
            code: refusal.code,
            detail: refusal.message.clone(),
            hint: Some(refusal.hint.clone()).filter(|hint| !hint.is_empty()),
            operation,
        }
    }

    /// The refusal that this is the HTTP form of.
    #[must_use]
    pub fn into_refusal(self) -> Refusal {
        Refusal {
            code: self.code,
            message: self.detail,
            hint: self.hint.unwrap_or_default(),
        }
    }
}

/// The HTTP status of a refusal (RFC 9110, RFC 6585).
#[must_use]
pub const fn status(code: Code) -> u16 {
    describe(code).0
}

const fn describe(code: Code) -> (u16, &'static str, &'static str) {
    match code {
        Code::InvalidInput => (400, "invalid-input", "A value is not allowed"),
        Code::Unauthenticated => (401, "unauthenticated", "No valid token"),
        Code::Forbidden => (403, "forbidden", "Not allowed with this token"),
        Code::NotFound => (404, "not-found", "No such thing"),
        Code::NameTaken => (409, "name-taken", "The name is taken"),
        Code::WrongState => (409, "wrong-state", "Not possible in the present state"),
        Code::Busy => (409, "busy", "Another operation is under way"),
        Code::Stale => (412, "stale", "Changed since it was read"),
        Code::KeyReused => (422, "key-reused", "The idempotency key was used for another request"),
        Code::QuotaExceeded => (403, "quota-exceeded", "The project's quota is used up"),
        Code::NoCapacity => (507, "no-capacity", "No host has room"),
        Code::Incompatible => (409, "incompatible", "The hosts do not fit each other"),
        Code::TooLate => (409, "too-late", "Too late"),
        Code::HostUnreachable => (503, "host-unreachable", "A host is not connected"),
        Code::HostFailed => (502, "host-failed", "A host failed"),
        Code::TimedOut => (504, "timed-out", "Out of time"),
        Code::Cancelled => (409, "cancelled", "Cancelled"),
        Code::ReadOnly => (503, "read-only", "Nothing can be stored now"),
        Code::Overloaded => (503, "overloaded", "Too much to do now"),
        Code::TooManyAttempts => (429, "too-many-attempts", "Too many attempts to log in"),
        Code::Other => (500, "other", "Refused for a reason of a newer version"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_survives_its_http_form_and_its_type_is_its_code() {
        for code in ["invalid-input", "too-late", "read-only", "name-taken", "other"] {
            let code: Code = serde_json::from_value(code.into()).unwrap();
            let refusal = Refusal::new(code, "it failed").hint("try this");
            let problem = Problem::of(&refusal, None);
            let name = serde_json::to_value(code).unwrap();
            assert_eq!(problem.kind, format!("urn:godwit:problem:{}", name.as_str().unwrap()));
            let text = serde_json::to_string(&problem).unwrap();
            let back: Problem = serde_json::from_str(&text).unwrap();
            assert_eq!(back.into_refusal(), refusal);
        }
    }

    #[test]
    fn a_problem_with_a_code_of_a_newer_version_is_still_read() {
        let text = r#"{"status":418,"code":"teapot","detail":"short and stout","new":1}"#;
        let problem: Problem = serde_json::from_str(text).unwrap();
        assert_eq!((problem.status, problem.code), (418, Code::Other));
    }
}
