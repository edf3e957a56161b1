//! How commands end: exit codes, and what is said on the way out.

use std::{
    error::Error,
    io::{self, Write as _},
    process::ExitCode,
};

use model::{Code, OperationId, Refusal};

use crate::out::safe;

/// The exit codes, for people: `godwit help exit-codes`, and in the long help.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
    0  it was done (with --no-wait, or where no terminal waits: it was accepted)
    1  refused, or tried and failed
    2  the command line is wrong
    3  the server cannot be reached, or is not one that this program knows
    4  there is no such thing
    5  a conflict: busy, wrong state, name taken, too late, changed meanwhile
    6  out of time
    7  godwit doctor found problems
  130  interrupted; the operation goes on";

/// How a command ends when not well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Refused, or tried and failed.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// No server, or none that is understood.
    Unreachable = 3,
    /// No such thing.
    NotFound = 4,
    /// Not now, or not any more.
    Conflict = 5,
    /// Out of time.
    TimedOut = 6,
    /// This machine lacks something (`godwit doctor`).
    Unwell = 7,
    /// By the person at the keyboard.
    Interrupted = 130,
}

impl Exit {
    /// The exit code of a refusal.
    pub(crate) const fn of(code: Code) -> Self {
        match code {
            Code::NotFound => Self::NotFound,
            Code::NameTaken
            | Code::WrongState
            | Code::Busy
            | Code::Stale
            | Code::KeyReused
            | Code::Incompatible
            | Code::TooLate => Self::Conflict,
            Code::TimedOut => Self::TimedOut,
            _ => Self::Failed,
        }
    }
}

/// Why a command did not do it: what failed and why, what to do next, and about which operation.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
    hint: String,
    operation: Option<OperationId>,
    /// A server that is starting or stopping says so: the same may well go through in a moment.
    passes: bool,
    /// The server does not take the token.
    unauthenticated: bool,
    /// Nobody reads any more: there is nothing to say, and nothing failed.
    closed: bool,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            hint: String::new(),
            operation: None,
            passes: exit as u8 == Exit::Unreachable as u8,
            unauthenticated: false,
            closed: false,
        }
    }

    /// An error with its causes, each once.
    pub(crate) fn of(exit: Exit, error: &dyn Error) -> Self {
        Self::new(exit, chain(error))
    }

    /// What a write to standard output came to.
    pub(crate) fn output(error: &io::Error) -> Self {
        Self {
            closed: error.kind() == io::ErrorKind::BrokenPipe,
            ..Self::new(Exit::Failed, format!("cannot write the output: {error}"))
        }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    pub(crate) fn about(mut self, operation: OperationId) -> Self {
        self.operation = Some(operation);
        self
    }

    /// Whether the same request may well go through in a moment.
    pub(crate) fn may_pass(&self) -> bool {
        self.passes
    }

    /// Whether the server does not take the token.
    pub(crate) fn is_unauthenticated(&self) -> bool {
        self.unauthenticated
    }

    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    /// What failed, and why.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// What to do next.
    pub(crate) fn advice(&self) -> &str {
        &self.hint
    }

    fn text(&self) -> String {
        let mut text = format!("error: {}\n", safe::text(&self.message));
        if !self.hint.is_empty() {
            text += &format!("  next: {}\n", safe::text(&self.hint));
        }
        if let Some(operation) = self.operation {
            text += &format!("  operation: {operation}\n");
        }
        text
    }

    /// Says it, and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        if self.closed {
            return ExitCode::SUCCESS;
        }
        // Where standard error is closed too, the exit code has to do.
        let _ = io::stderr().write_all(self.text().as_bytes());
        ExitCode::from(self.exit as u8)
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self {
            passes: matches!(refusal.code, Code::Overloaded | Code::ReadOnly),
            unauthenticated: refusal.code == Code::Unauthenticated,
            ..Self::new(Exit::of(refusal.code), refusal.message).hint(refusal.hint)
        }
    }
}

pub(crate) use model::story as chain;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_why_and_what_next_and_hides_no_escape() {
        let refusal = Refusal::new(Code::Busy, "VM web1 is held\u{1b}[31m").hint("wait for it");
        let failure = Failure::from(refusal).about(OperationId(uuid::Uuid::nil()));
        let text = failure.text();
        assert_eq!(
            text,
            "error: VM web1 is held\\u{1b}[31m\n  next: wait for it\n  operation: 00000000-0000-0000-0000-000000000000\n"
        );
        assert_eq!(failure.exit(), Exit::Conflict);
    }

    #[test]
    fn a_cause_is_not_said_twice() {
        #[derive(Debug)]
        struct Outer(io::Error);
        impl std::fmt::Display for Outer {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "cannot read x: {}", self.0)
            }
        }
        impl Error for Outer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&self.0)
            }
        }
        let error = Outer(io::Error::other("disk on fire"));
        assert_eq!(chain(&error), "cannot read x: disk on fire");
    }

    #[test]
    fn every_exit_code_is_documented() {
        let codes = [
            Exit::Failed,
            Exit::Usage,
            Exit::Unreachable,
            Exit::NotFound,
            Exit::Conflict,
            Exit::TimedOut,
            Exit::Unwell,
        ];
        for code in codes.into_iter().chain([Exit::Interrupted]) {
            let line = format!("{:>5}  ", code as u8);
            assert!(EXIT_CODES.lines().any(|text| text.starts_with(&line)), "{code:?}");
        }
    }
}
