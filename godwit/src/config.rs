//! Configuration files of servers: flags written down. `godwit agent --config FILE` reads as if its keys had been typed.
//!
//! A file only starts a process (where it listens, where its state is); what the cell does is set over the interface.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs::File,
    io::Read as _,
    path::Path,
};

use toml::{Table, Value};

use crate::{
    cli,
    exit::{Exit, Failure},
};

/// The commands that take a file.
const SERVERS: [&str; 3] = ["up", "controller", "agent"];

/// Longest file, bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// How far a key may be from a known one to be taken for a slip: Damerau-Levenshtein, as a share of 1.
const LIKENESS_MIN: f64 = 0.6;

/// The words with those of their `--config` file put in. What was typed wins over the file.
///
/// # Errors
/// [`Exit::Usage`] when the file cannot be read, is no TOML, or has a key or a value that the command does not take.
pub(crate) fn expanded(words: Vec<OsString>) -> Result<Vec<OsString>, Failure> {
    let Some((at, server)) = server_in(&words) else {
        return Ok(words);
    };
    let Some(file) = typed_value(&words[at..], "config") else {
        return Ok(words);
    };
    let path = Path::new(&file);
    let table = read(path)?;
    let known = keys(server);
    let mut put_in = Vec::new();
    for (key, value) in &table {
        if !known.contains(key.as_str()) {
            return Err(unknown(path, key, &known));
        }
        if typed_value(&words[at..], key).is_none() {
            put_in.extend(flags(path, key, value)?);
        }
    }
    let mut words = words;
    words.splice(at + 1..=at, put_in);
    Ok(words)
}

/// Which server is to run, and where its word stands.
fn server_in(words: &[OsString]) -> Option<(usize, &'static str)> {
    let at = words
        .iter()
        .position(|word| SERVERS.iter().any(|server| word == server))?;
    SERVERS
        .into_iter()
        .find(|server| words[at] == *server)
        .map(|server| (at, server))
}

/// What was typed behind `--key`, or after its `=`; empty for a switch at the end.
fn typed_value(words: &[OsString], key: &str) -> Option<OsString> {
    let flag = format!("--{key}");
    words.iter().enumerate().find_map(|(at, word)| {
        let word = word.to_str()?;
        if word == flag {
            return Some(words.get(at + 1).cloned().unwrap_or_default());
        }
        let value = word.strip_prefix(&flag)?.strip_prefix('=')?;
        Some(OsStr::new(value).to_owned())
    })
}

/// The keys that a file of this server may have: its flags, without those that make no sense there.
fn keys(server: &str) -> BTreeSet<String> {
    let mut whole = cli::command();
    whole.build();
    let command = whole.find_subcommand(server);
    let arguments = command.into_iter().flat_map(clap::Command::get_arguments);
    arguments
        .filter(|argument| !argument.is_hide_set())
        .filter_map(|argument| argument.get_long())
        .filter(|long| !["config", "help", "version"].contains(long))
        .map(str::to_owned)
        .collect()
}

fn read(path: &Path) -> Result<Table, Failure> {
    let shown = path.display();
    let wrong = |why: String| {
        Failure::new(Exit::Usage, format!("cannot use the configuration file {shown}: {why}"))
            .hint("keys are the command's long flags, without dashes: uplink = \"eth1\"")
    };
    let mut text = String::new();
    let file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(|error| wrong(error.to_string()))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(wrong(format!("it is longer than {FILE_BYTES_MAX} bytes")));
    }
    text.parse()
        .map_err(|error: toml::de::Error| wrong(error.to_string().trim_end().to_owned()))
}

/// A key and its value as they would be typed; a list is the flag again and again.
fn flags(path: &Path, key: &str, value: &Value) -> Result<Vec<OsString>, Failure> {
    let one = |text: &str| vec![OsString::from(format!("--{key}={text}"))];
    match value {
        Value::String(text) => Ok(one(text)),
        Value::Integer(number) => Ok(one(&number.to_string())),
        Value::Boolean(true) => Ok(vec![OsString::from(format!("--{key}"))]),
        Value::Boolean(false) => Ok(Vec::new()),
        Value::Array(values) if values.iter().all(|value| !value.is_array()) => {
            let each = values.iter().map(|value| flags(path, key, value));
            Ok(each.collect::<Result<Vec<_>, _>>()?.concat())
        }
        other => {
            let message = format!("{}: {key} is {}", path.display(), other.type_str());
            Err(Failure::new(Exit::Usage, message)
                .hint("give a text, a whole number, true or false, or a list of texts"))
        }
    }
}

fn unknown(path: &Path, key: &str, known: &BTreeSet<String>) -> Failure {
    let nearest = known
        .iter()
        .map(|one| (strsim::normalized_damerau_levenshtein(one, key), one))
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN);
    let hint = match nearest {
        Some((_, one)) => format!("did you mean {one}?"),
        None => format!(
            "known keys: {}",
            known.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
        ),
    };
    Failure::new(Exit::Usage, format!("{}: there is no key {key}", path.display())).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file(text: &str, words: &str) -> Result<Vec<String>, Failure> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        std::fs::write(&path, text).unwrap();
        let words = words.replace("FILE", path.to_str().unwrap());
        let words = words.split_whitespace().map(OsString::from).collect();
        let expanded = expanded(words)?;
        cli::parse(&expanded).unwrap();
        let path = path.to_str().unwrap().to_owned();
        Ok(expanded
            .iter()
            .map(|word| word.to_str().unwrap().replace(&path, "FILE"))
            .collect())
    }

    #[test]
    fn keys_are_flags() {
        let text = "uplink = \"eth1\"\nmtu = 1400\npool = [\"a=/srv/a\", \"b=/srv/b\"]\nstate = \"/srv/state\"\n";
        let words = with_file(text, "godwit agent --config FILE").unwrap();
        let wanted =
            "godwit agent --mtu=1400 --pool=a=/srv/a --pool=b=/srv/b --state=/srv/state --uplink=eth1 --config FILE";
        assert_eq!(words.join(" "), wanted);
    }

    #[test]
    fn what_is_typed_wins() {
        let words = with_file("mtu = 1400\n", "godwit agent --config=FILE --mtu 9000").unwrap();
        assert_eq!(words.join(" "), "godwit agent --config=FILE --mtu 9000");
    }

    #[test]
    fn other_commands_are_left_alone() {
        let words: Vec<OsString> = ["godwit", "vm", "list"].map(OsString::from).into();
        assert_eq!(expanded(words.clone()).unwrap(), words);
    }

    #[test]
    fn a_slip_is_refused_with_the_key_that_was_meant() {
        let refused = with_file("uplnk = \"eth1\"\n", "godwit agent --config FILE").unwrap_err();
        assert_eq!(
            (refused.exit(), refused.advice()),
            (Exit::Usage, "did you mean uplink?")
        );
        let refused = with_file("king = 1\n", "godwit agent --config FILE").unwrap_err();
        assert!(refused.advice().starts_with("known keys: "), "{}", refused.advice());
    }

    #[test]
    fn files_that_are_none_are_refused() {
        for text in [
            "uplink",
            "[agent]\nmtu = 1\n",
            "mtu = 1.5\n",
            "mtu = [[1]]\n",
            "mtu = 1\nmtu = 2\n",
            &"#".repeat(70_000),
        ] {
            let refused = with_file(text, "godwit agent --config FILE").unwrap_err();
            assert_eq!(refused.exit(), Exit::Usage, "{}", refused.message());
        }
        let words = ["godwit", "up", "--config", "/nowhere/up.toml"].map(OsString::from);
        let refused = expanded(words.into()).unwrap_err();
        assert!(refused.message().contains("/nowhere/up.toml"), "{}", refused.message());
    }
}
