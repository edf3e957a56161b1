//! `godwit documents`: what packages carry besides the binary, made from the command line itself: manual pages, completions, and
//! the reference of all commands. Hidden: it is for those who make packages.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::{Args, Command};
use clap_complete::env::{Bash, EnvCompleter, Fish, Zsh};

use super::completion;
use crate::{
    cli,
    exit::{Exit, Failure},
    out,
};

/// Write manual pages, completions and the reference of all commands.
#[derive(Args, Debug)]
pub(crate) struct Documents {
    /// Directory that they are written to; made where it is missing
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

impl Documents {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let mut whole = cli::command();
        whole.build();
        let mut files = vec![("commands.md".to_owned(), reference(&whole).into_bytes())];
        pages(&whole, &mut files)?;
        for (shell, name) in [
            (&Bash as &dyn EnvCompleter, "godwit"),
            (&Zsh, "_godwit"),
            (&Fish, "godwit.fish"),
        ] {
            files.push((format!("completion/{name}"), completion::script(shell)?.into_bytes()));
        }
        for (name, bytes) in &files {
            write(&self.directory.join(name), bytes)?;
        }
        out::line(&format!("{} files in {}", files.len(), self.directory.display()))
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    made.and_then(|()| fs::write(path, bytes)).map_err(|error| {
        Failure::new(Exit::Failed, format!("cannot write {}: {error}", path.display())).hint("give another directory")
    })
}

/// A manual page for each command that people type: `man/godwit-vm-migrate.1`.
fn pages(command: &Command, files: &mut Vec<(String, Vec<u8>)>) -> Result<(), Failure> {
    let name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name())
        .to_owned();
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(command.clone().display_name(&name));
    man.render(&mut page)
        .map_err(|error| Failure::of(Exit::Failed, &error))?;
    files.push((format!("man/{name}.1"), page));
    shown(command).try_for_each(|verb| pages(verb, files))
}

/// The commands below this one that people see; `help` describes itself.
fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    let seen = |verb: &&Command| !verb.is_hide_set() && verb.get_name() != "help";
    command.get_subcommands().filter(seen)
}

/// All commands with what they take, as Markdown.
fn reference(whole: &Command) -> String {
    let mut text = String::from(
        "# Every command\n\nMade from the command line itself by `godwit documents`; [command-line.md](command-line.md) has what all have in common.\n",
    );
    for noun in shown(whole) {
        text += &format!("\n## godwit {}\n\n{}\n", noun.get_name(), about(noun));
        if shown(noun).next().is_none() {
            text += &takes(noun);
        }
        for verb in shown(noun) {
            text += &format!(
                "\n### godwit {} {}\n\n{}\n{}",
                noun.get_name(),
                verb.get_name(),
                about(verb),
                takes(verb)
            );
        }
    }
    text
}

fn about(command: &Command) -> String {
    let about = command.get_long_about().or(command.get_about());
    about
        .map(|text| format!("{text}.").replace("..", "."))
        .unwrap_or_default()
}

/// How a command is typed, and a line for each of its own arguments.
fn takes(command: &Command) -> String {
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ");
    let arguments = command
        .get_arguments()
        .filter(|argument| !argument.is_hide_set() && !argument.is_global_set() && argument.get_id() != "help");
    let lines = arguments.map(|argument| {
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let defaults = argument
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy());
        let default = defaults.collect::<Vec<_>>().join(", ");
        let told = default.is_empty() || argument.is_hide_default_value_set() || !argument.get_action().takes_values();
        let default = if told {
            String::new()
        } else {
            format!(" (without it: `{default}`)")
        };
        format!("- `{}`: {help}{default}\n", argument.to_string().replace('`', ""))
    });
    let lines: String = lines.collect();
    format!(
        "\n```\n{}\n```\n{}{lines}",
        usage.trim_end(),
        if lines.is_empty() { "" } else { "\n" }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_in_the_tree_is_that_of_this_command_line() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/commands.md");
        let mut whole = cli::command();
        whole.build();
        let stored = fs::read_to_string(path).unwrap_or_default();
        assert!(
            stored == reference(&whole),
            "docs/commands.md is old: `cargo run -p godwit -- documents target/documents && cp target/documents/commands.md docs/`"
        );
    }

    #[test]
    fn every_command_has_a_page() {
        let directory = tempfile::tempdir().unwrap();
        Documents {
            directory: directory.path().to_owned(),
        }
        .run()
        .unwrap();
        for name in [
            "man/godwit.1",
            "man/godwit-vm-migrate.1",
            "man/godwit-agent.1",
            "completion/_godwit",
        ] {
            let text = fs::read_to_string(directory.path().join(name)).unwrap();
            assert!(text.len() > 200, "{name}: {text}");
        }
        assert!(!directory.path().join("man/godwit-documents.1").exists());
    }
}
