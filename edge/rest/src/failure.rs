//! Refusals as HTTP answers: `application/problem+json`.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use model::{Code, Refusal};
use wire::{Problem, problem::MEDIA_TYPE};

/// Why a request is refused, and with which status.
#[derive(Debug)]
pub(crate) struct Failure(Box<Problem>);

impl Failure {
    /// A value of the request is not allowed.
    pub(crate) fn input(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Refusal::new(Code::InvalidInput, message).hint(hint).into()
    }

    /// As its refusal has it, but that what it repeats of the request can do nothing to a terminal or a log.
    fn of(refusal: &Refusal) -> Box<Problem> {
        let mut problem = Problem::of(refusal, None);
        problem.detail = visible(&problem.detail);
        Box::new(problem)
    }

    /// A refusal whose status says more than its code does.
    pub(crate) fn with_status(status: StatusCode, refusal: &Refusal) -> Self {
        let mut problem = Self::of(refusal);
        problem.status = status.as_u16();
        problem.title = status.canonical_reason().unwrap_or_default().to_owned();
        Self(problem)
    }
}

/// A text with its control characters written out.
fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for one in text.chars() {
        if one.is_control() {
            shown.extend(one.escape_default());
        } else {
            shown.push(one);
        }
    }
    shown
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self(Self::of(&refusal))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let code = self.0.code;
        let mut response = (status, axum::Json(*self.0)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"godwit\""),
            );
        }
        if matches!(code, Code::Overloaded) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_refusal_repeats_of_a_request_is_made_visible() {
        let failure = Failure::input("no field `a\0b\n\u{1b}[31m` is known, nor ä", "");
        assert_eq!(failure.0.detail, "no field `a\\u{0}b\\n\\u{1b}[31m` is known, nor ä");
    }
}
