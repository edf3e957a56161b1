//! One file for each noun.

pub(crate) mod addressing;
pub(crate) mod agent;
pub(crate) mod audit;
pub(crate) mod completion;
pub(crate) mod controller;
pub(crate) mod doctor;
pub(crate) mod documents;
pub(crate) mod events;
pub(crate) mod host;
pub(crate) mod login;
pub(crate) mod network;
pub(crate) mod op;
pub(crate) mod plan;
pub(crate) mod pool;
pub(crate) mod port;
pub(crate) mod project;
pub(crate) mod security_group;
pub(crate) mod template;
pub(crate) mod token;
pub(crate) mod top;
pub(crate) mod up;
pub(crate) mod user;
pub(crate) mod vm;

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    cli::{Cli, Command, Common},
    client::{Client, locate::locate},
    exit::{EXIT_CODES, Exit, Failure},
    out::{self, Format},
};

/// Most items that a list shows.
const ITEMS_MAX: usize = 100_000;

/// Where the state of servers is when they are not told.
pub(crate) const STATE: &str = "/var/lib/godwit";

/// The columns of a list.
struct Heading {
    narrow: &'static [&'static str],
    /// Those that `-o wide` adds.
    wide: &'static [&'static str],
}

/// What a command of a client works with.
pub(crate) struct Session {
    pub(crate) client: Client,
    pub(crate) format: Format,
}

impl Session {
    fn open(common: &Common) -> Result<Self, Failure> {
        let server = locate(&common.flags(), |name| std::env::var_os(name))?;
        Ok(Self {
            client: Client::new(server),
            format: common.output,
        })
    }

    /// Prints all items of a list: for programs as they came, for people as rows.
    async fn list<T: DeserializeOwned>(
        &self,
        path: &str,
        items_max: Option<usize>,
        heading: Heading,
        row: impl Fn(T, bool) -> Vec<String>,
    ) -> Result<(), Failure> {
        let items = self.client.list(path, items_max.unwrap_or(ITEMS_MAX)).await?;
        if self.format.is_data() {
            return out::data(self.format, &items);
        }
        let wide = self.format == Format::Wide;
        let rows = items
            .iter()
            .map(|item| Ok(row(out::read(item)?, wide)))
            .collect::<Result<Vec<_>, Failure>>()?;
        let heading = if wide {
            [heading.narrow, heading.wide].concat()
        } else {
            heading.narrow.to_vec()
        };
        out::text(&out::table::rows(&heading, rows))
    }

    /// Prints one thing: for programs as it came, for people as facts.
    async fn show<T: DeserializeOwned>(&self, path: &str, facts: impl Fn(T) -> String) -> Result<(), Failure> {
        let value = self.client.get(path).await?;
        if self.format.is_data() {
            return out::data(self.format, &value);
        }
        out::text(&facts(out::read(&value)?))
    }

    /// What the items of a list are called, by their ids.
    async fn names(&self, path: &str) -> Result<BTreeMap<String, String>, Failure> {
        let items = self.client.list(path, ITEMS_MAX).await?;
        let named = items.iter().filter_map(|item| {
            let (id, name) = (item["id"].as_str()?, item["name"].as_str()?);
            Some((id.to_owned(), name.to_owned()))
        });
        Ok(named.collect())
    }

    /// Deletes what may be gone already: then it is said, and well.
    async fn delete(&self, path: &str, what: &str) -> Result<Option<Value>, Failure> {
        match self.client.delete(path).await {
            Ok(answer) => Ok(Some(answer)),
            Err(failure) if failure.exit() == Exit::NotFound => {
                out::note(&format!("{what} is not there: nothing to do"));
                if self.format.is_data() {
                    out::data(self.format, &Value::Null)?;
                }
                Ok(None)
            }
            Err(failure) => Err(failure),
        }
    }
}

/// Runs a command to its end.
pub(crate) async fn run(cli: Cli) -> Result<(), Failure> {
    let common = &cli.common;
    let session = || Session::open(common);
    match cli.command {
        Command::Up(_) | Command::Controller(_) | Command::Agent(_) if common.asks_a_server() => {
            let message = "--server, --ca, --token-file, --project and --output are for commands that ask a server";
            Err(Failure::new(Exit::Usage, message).hint("leave them out"))
        }
        Command::Up(up) => up.run(common).await,
        Command::Controller(controller) => controller.run(common).await,
        Command::Agent(agent) => agent.run(common).await,
        Command::Host(host) => host.run(&session()?).await,
        Command::Template(template) => template.run(&session()?).await,
        Command::Vm(vm) => vm.run(&session()?).await,
        Command::Op(op) => op.run(&session()?).await,
        Command::Events(events) => events.run(&session()?).await,
        Command::Network(network) => network.run(&session()?).await,
        Command::Port(port) => port.run(&session()?).await,
        Command::SecurityGroup(group) => group.run(&session()?).await,
        Command::Pool(pool) => pool.run(&session()?).await,
        Command::Top(top) => top.run(&session()?).await,
        Command::Doctor(doctor) => doctor.run(common).await,
        Command::Login(login) => login.run(common).await,
        Command::Logout => login::logout(&session()?).await,
        Command::Whoami => login::whoami(&session()?).await,
        Command::User(user) => user.run(&session()?).await,
        Command::Project(project) => project.run(&session()?).await,
        Command::Token(token) => token.run(&session()?).await,
        Command::Audit(audit) => audit.run(&session()?).await,
        Command::Completion(completion) => completion.run(),
        Command::Documents(documents) => documents.run(),
        Command::ExitCodes => out::line(EXIT_CODES),
    }
}
