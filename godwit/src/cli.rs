//! The command line: nouns, then verbs, then what they take.

use std::{ffi::OsStr, path::PathBuf};

use clap::{Arg, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use clap_complete::ArgValueCompleter;
use model::name::Reference;

use crate::{
    client::locate::Flags,
    commands::{
        agent, audit, completion, controller, doctor, documents, events, host, login, network, op, pool, port, project,
        security_group, template, token, top, up, user, vm,
    },
    exit::EXIT_CODES,
    out::Format,
};

/// Provisions virtual machines on a pool of hosts and moves them while they run
#[derive(Parser, Debug)]
#[command(name = "godwit", version, after_long_help = EXIT_CODES, propagate_version = false)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The options of commands that ask a server: their ids, and what they are called on the command line.
const OF_CLIENTS: [(&str, &str); 5] = [
    ("server", "server"),
    ("ca", "ca"),
    ("token_file", "token-file"),
    ("project", "project"),
    ("output", "output"),
];

/// The whole command line. Servers do not have what only clients can use.
pub(crate) fn command() -> clap::Command {
    let without = |server: clap::Command| {
        OF_CLIENTS.into_iter().fold(server, |server, (id, name)| {
            let refused = |_: &str| Err::<String, _>("it is for commands that ask a server; leave it out");
            let arg = Arg::new(id).long(name).hide(true).value_parser(refused);
            server.arg(if name == "output" { arg.short('o') } else { arg })
        })
    };
    ["up", "controller", "agent"]
        .into_iter()
        .fold(Cli::command(), |command, server| {
            command.mut_subcommand(server, without)
        })
}

/// Reads a command line.
pub(crate) fn parse(words: &[impl AsRef<OsStr>]) -> Result<Cli, clap::Error> {
    let matches = command().try_get_matches_from(words.iter().map(AsRef::as_ref))?;
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command()))
}

/// What every command takes.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Common {
    /// State directory: a server's own; for other commands, of the server on this machine that they ask
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// The server to ask [env: GODWIT_SERVER]
    #[arg(long, global = true, value_name = "https://HOST:PORT")]
    pub(crate) server: Option<String>,
    /// File with the certificate of the server's authority [env: GODWIT_CA]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// File with the token to ask with, mode 0600 [env: GODWIT_TOKEN_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// The project that the command is about; without it, the token's own [env: GODWIT_PROJECT]
    #[arg(long, global = true, value_name = "PROJECT", add = ArgValueCompleter::new(completion::projects))]
    pub(crate) project: Option<Reference>,
    /// How results are printed
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) output: Format,
}

impl Common {
    /// Whether it says anything that is of use only to who asks a server.
    pub(crate) fn asks_a_server(&self) -> bool {
        let named = self.server.is_some() || self.ca.is_some() || self.token_file.is_some();
        named || self.project.is_some() || self.output != Format::default()
    }

    pub(crate) fn flags(&self) -> Flags {
        Flags {
            state: self.state.clone(),
            server: self.server.clone(),
            ca: self.ca.clone(),
            token_file: self.token_file.clone(),
            project: self.project.clone(),
        }
    }
}

/// The nouns.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run a controller and an agent on this machine
    Up(Box<up::Up>),
    /// Run the controller
    Controller(Box<controller::Controller>),
    /// Run the agent of this host
    Agent(Box<agent::Agent>),
    /// Machines that run VMs
    #[command(subcommand)]
    Host(host::Host),
    /// What VMs are made from
    #[command(subcommand)]
    Template(template::Template),
    /// Virtual machines
    #[command(subcommand)]
    Vm(vm::Vm),
    /// Operations: slow work, under way or over
    #[command(subcommand)]
    Op(op::Op),
    /// What happens, as it happens
    Events(events::Events),
    /// Networks
    #[command(subcommand)]
    Network(network::Network),
    /// VMs' attachments to networks, and what they let through
    #[command(subcommand)]
    Port(port::Port),
    /// Rules that ports share
    #[command(subcommand)]
    SecurityGroup(security_group::SecurityGroup),
    /// Storage pools
    #[command(subcommand)]
    Pool(pool::Pool),
    /// What VMs and hosts use, as it changes
    Top(top::Top),
    /// Say what this machine lacks, and how to mend it
    Doctor(Box<doctor::Doctor>),
    /// Begin a session with a user's password
    Login(login::Login),
    /// End the session, or the token that is used
    Logout,
    /// Who you are to the server, and what you may do
    Whoami,
    /// People, and what they may do
    #[command(subcommand)]
    User(user::User),
    /// Projects, and what their VMs may hold
    #[command(subcommand)]
    Project(project::Project),
    /// Tokens with which programs come in
    #[command(subcommand)]
    Token(token::Token),
    /// Who asked for what, from where, and what came of it
    #[command(subcommand)]
    Audit(audit::Audit),
    /// Print the script that completes commands and names in a shell
    Completion(completion::Completion),
    /// Write manual pages, completions and the reference of all commands
    #[command(hide = true)]
    Documents(documents::Documents),
    /// How commands end
    #[command(name = "exit-codes", hide = true, long_about = EXIT_CODES)]
    ExitCodes,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        super::parse(&words.split_whitespace().collect::<Vec<_>>())
    }

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn what_the_documents_show_is_understood() {
        for line in [
            "godwit up",
            "godwit up --state /srv/godwit",
            "godwit controller --state /s --listen 10.0.0.1:1 --agent-listen 10.0.0.1:2 --name 10.0.0.1 --name c.example --subnet 10.91.0.0/24 --gateway 10.91.0.1 --range 10.91.0.50-10.91.0.250",
            "godwit agent --state /s --run-dir /r --pool shared=/srv/a --pool local=/srv/b --bridge godwit0 --uplink vm0 --name h1 --address 10.0.0.1 --gateway 10.91.0.1/24 --mtu 1400 --qemu /usr/bin/qemu-system-x86_64",
            "godwit --state /s vm list",
            "godwit vm list -o json",
            "godwit host add-token -o json",
            "godwit template build micro",
            "godwit template import debian disk.qcow2 --format qcow2",
            "godwit template import mine --kernel vmlinuz --initrd initrd --cmdline console=ttyS0",
            "godwit vm create web1 --template micro --memory 512M --vcpus 1 --host h1 --wait -o json",
            "godwit vm create web1 --template micro --dry-run",
            "godwit vm migrate web1 --to h2 --wait -o json",
            "godwit vm migrate web1 --dry-run",
            "godwit vm stop web1 --grace 5 --no-wait",
            "godwit vm delete web1 --wait",
            "godwit op wait 0197b2a0-0000-7000-8000-000000000000 --timeout 5",
            "godwit events --follow --after 7",
            "godwit completion bash",
            "godwit login",
            "godwit login alice --password-file -",
            "godwit logout",
            "godwit whoami -o json",
            "godwit user create alice --role operator --password-file /run/pw",
            "godwit --project team-a user grant alice project-admin",
            "godwit user grant alice cloud-admin",
            "godwit user revoke alice --cloud-admin",
            "godwit user password",
            "godwit user disable alice",
            "godwit project create team-a --vms 4 --vcpus 8 --memory 16G --disk 1T",
            "godwit project quota team-a --vms none",
            "godwit network addressing default --method dhcp --ipv6 fd00:91::/64 --gateway6 fe80::1 --dns 9.9.9.9 --dns 2620:fe::fe --search a.example --lease 600 --metadata open",
            "godwit network addressing default --ipv6 none --no-dns --dry-run",
            "godwit token create ci --role operator --ttl 86400 --out /run/ci.token",
            "godwit token revoke 0197b2a0-0000-7000-8000-000000000000",
            "godwit vm list --project team-a",
            "godwit audit list --subject alice/ci --from 2026-11-01 --until 2026-11-20T12:00:00Z",
            "godwit audit export --format csv",
            "godwit top",
            "godwit top --hosts --sort memory --filter web --every 5",
            "godwit top --once --project team-a -o json",
            "godwit security-group create web",
            "godwit security-group show web",
            "godwit security-group add-rule web ingress --protocol tcp --port 80-443 --remote 10.0.0.0/8",
            "godwit security-group add-rule web egress --remote-group db",
            "godwit security-group remove-rule web 2",
            "godwit security-group delete web",
            "godwit vm create web1 --template micro --security-group web --security-group db --allow-address 10.0.0.100",
            "godwit port list -o wide",
            "godwit port show web1",
            "godwit port set web1 --link down",
            "godwit port set web1 --rate-limit 1M --burst 256K",
            "godwit port set web1 --rate-limit-to-guest none --rate-limit-from-guest 1M",
            "godwit port set web1 --no-security-group --no-allow-address",
            "godwit doctor",
            "godwit doctor --for agent --for client --pool shared=/srv/a --uplink eth1 --mtu 9000 --port 1 --port 2 -o json",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).err().unwrap());
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_code_for_usage() {
        for line in [
            "godwit vm create ../x --template micro",
            "godwit vm create web1",
            "godwit vm create web1 --template micro --vcpus 0",
            "godwit vm create web1 --template micro --vcpus -1",
            "godwit vm create web1 --template micro --memory 1e400",
            "godwit vm start -drive",
            "godwit vm list -o xml",
            "godwit agent --pool shared",
            "godwit agent --join gwj1.x@h",
            "godwit controller --subnet 10.91.0.0",
            "godwit controller --range 10.91.0.9-10.91.0.1",
            "godwit network addressing default --ipv6 fd00:91::/48",
            "godwit network addressing default --lease 1",
            "godwit network addressing default --dns 9.9.9.9 --no-dns",
            "godwit op show not-an-id",
            "godwit doctor --for king",
            "godwit top --sort luck",
            "godwit top --every 0",
            "godwit doctor --port 0",
            "godwit doctor --pool /srv/a",
            "godwit doctor --uplink ../x",
            "godwit frobnicate",
            "godwit security-group add-rule web sideways",
            "godwit security-group add-rule web ingress --remote 10.0.0.1/8",
            "godwit security-group add-rule web ingress --port 90-80",
            "godwit security-group add-rule web ingress --protocol sctp",
            "godwit security-group add-rule web ingress --remote 10.0.0.0/8 --remote-group db",
            "godwit port set web1 --link sideways",
            "godwit port set web1 --rate-limit fast",
            "godwit port set web1 --security-group web --no-security-group",
            "godwit user grant alice king",
            "godwit user create ../x",
            "godwit token create ci",
            "godwit project quota team-a --memory 1.5",
            "godwit audit list --from yesterday",
            "godwit audit export --format xml",
            "godwit vm list --project ../x",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
