//! An error as it is told to people: the whole story in one line.

use std::error::Error;

/// An error and its causes, outermost first, in one line. A cause that the line has already is left out.
#[must_use]
pub fn story(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use thiserror::Error;

    #[derive(Debug, Error)]
    #[error("{what}")]
    struct Outer {
        what: &'static str,
        #[source]
        source: io::Error,
    }

    #[test]
    fn each_cause_is_told_once() {
        let outer = |what| Outer {
            what,
            source: io::Error::other("the disk is full"),
        };
        let told = |what| super::story(&outer(what));
        assert_eq!(told("cannot write"), "cannot write: the disk is full");
        assert_eq!(told("cannot write: the disk is full"), "cannot write: the disk is full");
    }
}
