//! Interface names: what the kernel accepts, and nothing that a file path or a command line could misread.

use std::{fmt, str::FromStr};

/// Longest interface name, in bytes (`IFNAMSIZ` less its terminating zero).
const NAME_BYTES_MAX: usize = 15;

/// The name of a network interface: 1 to 15 of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InterfaceName(String);

/// Why a text is not an interface name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} cannot name a network interface: use 1 to 15 of A-Z a-z 0-9 . _ - and start with a letter or digit")]
pub struct NameError {
    text: String,
}

impl InterfaceName {
    /// The name itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let fits = text.len() <= NAME_BYTES_MAX;
        let starts = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let all = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if fits && starts && all {
            return Ok(Self(text.to_owned()));
        }
        // Bounded, since the text may come from anywhere and ends up in messages.
        Err(NameError {
            text: text.chars().take(40).collect(),
        })
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_or_a_path_would_misread_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a b",
            "-br0",
            "br0\n",
            "br\0",
            "sixteen-letters-",
            "br:0",
            "µ",
        ] {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad:?}");
        }
        for good in ["br0", "godwit0", "eth0.100", "fifteen-letters"] {
            assert_eq!(good.parse::<InterfaceName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn the_refusal_of_an_endless_name_is_short() {
        let error = "x".repeat(100_000).parse::<InterfaceName>().unwrap_err();
        assert!(error.to_string().len() < 200);
    }
}
