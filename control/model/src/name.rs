//! Names that people give: short, lower case, safe in a hostname, a path, an argument and a terminal.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;
use uuid::Uuid;

/// A name of 1 to 63 characters, `a-z`, `0-9` and `-`, beginning and ending with a letter or digit (RFC 1123 label), that is
/// not the text of a UUID (those are reserved for ids).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
pub struct Name(String);

/// Why a text is no [`Name`]. The text itself is not repeated: it may hold terminal escapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// Nothing there.
    #[error("a name is empty; use 1 to 63 of a-z, 0-9 and -")]
    Empty,
    /// More than 63 characters.
    #[error("a name is {0} characters long; at most 63 are allowed")]
    TooLong(usize),
    /// A character outside the set.
    #[error("a name has a character at position {0} that is not one of a-z, 0-9 and -")]
    Character(usize),
    /// A dash at an end.
    #[error("a name begins or ends with -; it must begin and end with a letter or digit")]
    Dash,
    /// The text of a UUID.
    #[error("a name looks like an id; choose one that is not a UUID")]
    LooksLikeId,
}

impl Name {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let length = text.chars().count();
        if length == 0 {
            return Err(NameError::Empty);
        }
        if length > 63 {
            return Err(NameError::TooLong(length));
        }
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if let Some(at) = text.chars().position(|c| !allowed(c)) {
            return Err(NameError::Character(at + 1));
        }
        if text.starts_with('-') || text.ends_with('-') {
            return Err(NameError::Dash);
        }
        if Uuid::try_parse(text).is_ok() {
            return Err(NameError::LooksLikeId);
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// How a request refers to a thing: by its id or by its name within the actor's project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Reference {
    /// By id.
    Id(Uuid),
    /// By name.
    Name(Name),
}

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match Uuid::try_parse(text) {
            Ok(id) => Ok(Self::Id(id)),
            Err(_) => text.parse().map(Self::Name),
        }
    }
}

impl TryFrom<String> for Reference {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> Self {
        reference.to_string()
    }
}

impl utoipa::PartialSchema for Reference {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        String::schema()
    }
}

impl ToSchema for Reference {}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_could_reach_a_shell_path_or_terminal_are_refused() {
        for bad in [
            "",
            "../x",
            "a,b=c",
            "-drive",
            "a\0b",
            "a\nb",
            "\u{202e}abc",
            "\u{1b}[31m",
            "A",
            "a-",
            "a b",
            "ä",
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
        assert_eq!("x".repeat(300).parse::<Name>(), Err(NameError::TooLong(300)));
        assert_eq!(
            "0197b2a0-0000-7000-8000-000000000000".parse::<Name>(),
            Err(NameError::LooksLikeId)
        );
    }

    proptest! {
        #[test]
        fn any_text_is_a_name_as_it_stands_or_refused(text in any::<String>()) {
            if let Ok(name) = text.parse::<Name>() {
                prop_assert_eq!(name.as_str(), text);
            }
        }
    }
}
