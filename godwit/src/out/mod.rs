//! What commands print: tables for people, JSON and YAML for programs. Standard output only.

pub(crate) mod live;
pub(crate) mod receipt;
pub(crate) mod safe;
pub(crate) mod table;
pub(crate) mod units;

use std::io::{self, Write as _};

use clap::ValueEnum;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::exit::{Exit, Failure};

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns.
    #[default]
    Table,
    /// More columns.
    Wide,
    /// JSON, all fields that the server gave.
    Json,
    /// YAML, the same.
    Yaml,
}

impl Format {
    /// Whether programs read it.
    pub(crate) const fn is_data(self) -> bool {
        matches!(self, Self::Json | Self::Yaml)
    }
}

/// Prints a text as it is; its foreign parts have been made safe.
pub(crate) fn text(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::output(&error))
}

/// Prints a line.
pub(crate) fn line(line: &str) -> Result<(), Failure> {
    text(&format!("{line}\n"))
}

/// Says something that is no result, on standard error.
pub(crate) fn note(note: &str) {
    // Nobody may read it.
    let _ = writeln!(io::stderr(), "{note}");
}

/// Prints a value for programs.
pub(crate) fn data(format: Format, value: &impl Serialize) -> Result<(), Failure> {
    let value = serde_json::to_value(value).map_err(|error| Failure::of(Exit::Failed, &error))?;
    text(&rendered(format, &value)?)
}

fn rendered(format: Format, value: &Value) -> Result<String, Failure> {
    if format == Format::Yaml {
        return serde_yaml_ng::to_string(&safe::value(value)).map_err(|error| Failure::of(Exit::Failed, &error));
    }
    let json = serde_json::to_string_pretty(value).map_err(|error| Failure::of(Exit::Failed, &error))?;
    Ok(format!("{}\n", safe::json(&json)))
}

/// A server's answer as one of the model's nouns.
pub(crate) fn read<T: DeserializeOwned>(value: &Value) -> Result<T, Failure> {
    T::deserialize(value).map_err(|error| {
        let message = format!("the server's answer has a form that this program does not know: {error}");
        Failure::new(Exit::Unreachable, message).hint("use a godwit of the server's version, or -o json")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn data_reaches_programs_whole_and_terminals_without_controls() {
        let value = json!({ "name": "a\u{9b}31m\u{202e}b\u{1b}[0m", "n": 1 });
        let text = rendered(Format::Json, &value).unwrap();
        assert!(!text.contains(['\u{9b}', '\u{202e}', '\u{1b}']), "{text:?}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
        let text = rendered(Format::Yaml, &value).unwrap();
        assert!(!text.contains(['\u{9b}', '\u{202e}', '\u{1b}']), "{text:?}");
    }
}
