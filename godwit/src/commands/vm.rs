//! `godwit vm`: virtual machines and what can be done with them.

use std::collections::BTreeMap;

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::ArgValueCompleter;
use model::{
    Name,
    command::CreateVm,
    layout::Family,
    name::Reference,
    query::{HostView, VmView},
};
use serde_json::json;

use self::guest::Guest;
use super::{Heading, Session, completion, host::said, plan};
use crate::{
    exit::Failure,
    follow::{Followed, Wait, follow, follow_saying},
    out::{self, receipt, table, units},
};

mod console;
mod guest;

/// What can be done with VMs.
#[derive(Subcommand, Debug)]
pub(crate) enum Vm {
    /// Make a VM and start it
    Create(Box<Create>),
    /// List VMs
    List,
    /// Show a VM
    Show(One),
    /// Start a VM that is off
    Start(Verb),
    /// Ask the guest to power off, then end it
    Stop {
        #[command(flatten)]
        verb: Verb,
        /// How long the guest may take
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=3600), value_name = "SECONDS")]
        grace: u32,
    },
    /// Reset a VM
    Reboot(Verb),
    /// End a VM at once, as by pulling its plug
    Kill(Verb),
    /// Make a VM stand, held in memory
    Pause(Verb),
    /// Let a paused VM run again
    Resume(Verb),
    /// End a VM and delete its disks; one that is not there is deleted already
    Delete(Verb),
    /// Move a VM to another host while it runs
    Migrate {
        #[command(flatten)]
        verb: Verb,
        /// The host; without it one is chosen
        #[arg(long, add = ArgValueCompleter::new(completion::hosts), value_name = "HOST")]
        to: Option<Reference>,
        /// Say which host would be chosen and why, and do nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Use a VM's serial console; on a terminal Ctrl-] leaves it
    Console(One),
}

/// Which VM.
#[derive(Args, Debug)]
pub(crate) struct One {
    /// Name or id
    #[arg(add = ArgValueCompleter::new(completion::vms))]
    vm: Reference,
}

/// Which VM, and whether to wait.
#[derive(Args, Debug)]
pub(crate) struct Verb {
    #[command(flatten)]
    one: One,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Machine {
    /// PCI Express (Intel Q35)
    #[default]
    Q35,
    /// PCI (Intel 440FX)
    Pc,
}

/// A VM to make.
#[derive(Args, Debug)]
pub(crate) struct Create {
    /// Its name: 1 to 63 of a-z, 0-9 and -
    name: Name,
    /// What it is made from
    #[arg(long, add = ArgValueCompleter::new(completion::templates))]
    template: Reference,
    /// vCPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    vcpus: u16,
    /// Memory, such as 512M or 2G; a plain number is MiB
    #[arg(long, default_value = "512M", value_parser = units::mebibytes, value_name = "SIZE")]
    memory: u64,
    /// Size of its disk, such as 10G; without it, the template's
    #[arg(long, value_parser = units::bytes, value_name = "SIZE")]
    disk: Option<u64>,
    /// Machine family
    #[arg(long, value_enum, default_value_t)]
    machine: Machine,
    /// Its network; without it, `default`
    #[arg(long, add = ArgValueCompleter::new(completion::networks))]
    network: Option<Reference>,
    /// Its host; without it one is chosen
    #[arg(long, add = ArgValueCompleter::new(completion::hosts))]
    host: Option<Reference>,
    /// Its pool; without it one is chosen
    #[arg(long, add = ArgValueCompleter::new(completion::pools))]
    pool: Option<Reference>,
    /// Security group of its port, give it again for more; without one it is not filtered
    #[arg(long = "security-group", value_name = "GROUP", add = ArgValueCompleter::new(completion::security_groups))]
    security_groups: Vec<Reference>,
    /// Addresses beyond its own from which its guest may send, give it again for more; for routers and shared addresses
    #[arg(long = "allow-address", value_name = "CIDR")]
    allow_addresses: Vec<model::policy::Cidr>,
    #[command(flatten)]
    guest: Guest,
    /// Make it, and leave it off
    #[arg(long)]
    no_start: bool,
    /// Say which host would be chosen and why, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    wait: Wait,
}

impl Vm {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::Create(create) => create.run(session).await,
            Self::List => session.list("/v1/vms", None, HEADING, row).await,
            Self::Show(One { vm }) => show(session, &vm).await,
            Self::Start(verb) => verb.ask(session, "start", &json!({})).await,
            Self::Stop { verb, grace } => stop(session, verb, grace).await,
            Self::Reboot(verb) => verb.ask(session, "reboot", &json!({})).await,
            Self::Kill(verb) => verb.ask(session, "kill", &json!({})).await,
            Self::Pause(verb) => verb.ask(session, "pause", &json!({})).await,
            Self::Resume(verb) => verb.ask(session, "resume", &json!({})).await,
            Self::Delete(Verb { one: One { vm }, wait }) => {
                let Some(answer) = session.delete(&format!("/v1/vms/{vm}"), &format!("VM {vm}")).await? else {
                    return Ok(());
                };
                let followed = follow(&session.client, session.format, answer, wait).await?;
                said(session, followed.is_done(), &format!("{vm} is deleted"))
            }
            Self::Migrate { verb, to, dry_run } => migrate(session, verb, to, dry_run).await,
            Self::Console(One { vm }) => console::run(session, &vm).await,
        }
    }
}

impl Verb {
    async fn ask(self, session: &Session, verb: &str, body: &serde_json::Value) -> Result<(), Failure> {
        let answer = session
            .client
            .post(&format!("/v1/vms/{}/{verb}", self.one.vm), body)
            .await?;
        let followed = follow(&session.client, session.format, answer, self.wait).await?;
        now(session, &followed).await
    }
}

impl Create {
    async fn run(self, session: &Session) -> Result<(), Failure> {
        let family = match self.machine {
            Machine::Q35 => Family::Q35,
            Machine::Pc => Family::Pc,
        };
        let guest = self.guest.read()?;
        let wanted = CreateVm {
            name: self.name,
            template: self.template,
            vcpus: self.vcpus,
            memory_mib: self.memory,
            disk_bytes: self.disk,
            family,
            network: self.network,
            host: self.host,
            pool: self.pool,
            start: !self.no_start,
            hostname: guest.hostname,
            ssh_keys: guest.ssh_keys,
            user_data: guest.user_data,
            security_groups: self.security_groups,
            allow_addresses: self.allow_addresses,
        };
        if self.dry_run {
            let answer = session.client.post("/v1/vms?dry_run=true", &wanted).await?;
            return plan::show(session, &answer);
        }
        let answer = session.client.post("/v1/vms", &wanted).await?;
        let followed = follow(&session.client, session.format, answer, self.wait).await?;
        now(session, &followed).await?;
        warn_of_room(session, &followed).await
    }
}

async fn stop(session: &Session, verb: Verb, grace_s: u32) -> Result<(), Failure> {
    let path = format!("/v1/vms/{}/stop", verb.one.vm);
    let answer = session.client.post(&path, &json!({ "grace_s": grace_s })).await?;
    let waiting_for = format!("waiting for the guest to power off, {grace_s} s at most");
    let followed = follow_saying(&session.client, session.format, answer, verb.wait, &waiting_for).await?;
    now(session, &followed).await?;
    let operation = &followed.view.operation;
    let took = operation
        .finished_at
        .map(|at| at.0.saturating_sub(operation.created_at.0));
    if followed.is_done() && took.is_some_and(|took| took >= i64::from(grace_s) * 1000) {
        out::note(&format!(
            "the guest had not powered off within {grace_s} s: its plug was pulled"
        ));
    }
    Ok(())
}

async fn migrate(session: &Session, verb: Verb, to: Option<Reference>, dry_run: bool) -> Result<(), Failure> {
    let path = format!("/v1/vms/{}/migrate", verb.one.vm);
    let body = json!({ "to": to });
    if dry_run {
        let answer = session.client.post(&format!("{path}?dry_run=true"), &body).await?;
        return plan::show(session, &answer);
    }
    let answer = session.client.post(&path, &body).await?;
    let followed = follow(&session.client, session.format, answer, verb.wait).await?;
    now(session, &followed).await?;
    match followed.view.operation.migration() {
        Some(migration) if followed.is_done() && !session.format.is_data() => {
            out::text(&format!("\n{}", receipt::show(migration)))
        }
        _ => Ok(()),
    }
}

/// Says to people where a disk may outgrow its pool: disks take room as they are written, and nothing keeps it free for them.
async fn warn_of_room(session: &Session, followed: &Followed) -> Result<(), Failure> {
    let target = followed.view.operation.target.id;
    let view: VmView = out::read(&session.client.get(&format!("/v1/vms/{target}")).await?)?;
    let Some(host) = &view.host else {
        return Ok(());
    };
    // Who may not look at hosts is not told of their room.
    let Ok(host) = session.client.get(&format!("/v1/hosts/{}", host.id)).await else {
        return Ok(());
    };
    let host: HostView = out::read(&host)?;
    let pools = host.host.status.facts.map(|facts| facts.pools).unwrap_or_default();
    for volume in &view.volumes {
        let pool = pools.iter().find(|pool| pool.id == volume.pool);
        if let Some(pool) = pool.filter(|pool| pool.free_bytes < volume.size_bytes) {
            let (most, free) = (units::show_bytes(volume.size_bytes), units::show_bytes(pool.free_bytes));
            out::note(&format!(
                "its disk may grow to {most}, and pool {} has {free} free: a guest that fills it will meet write errors",
                pool.name
            ));
        }
    }
    Ok(())
}

/// Says to people how the VM is when an operation on it is done.
async fn now(session: &Session, followed: &Followed) -> Result<(), Failure> {
    if session.format.is_data() || !followed.is_done() {
        return Ok(());
    }
    let view: VmView = out::read(
        &session
            .client
            .get(&format!("/v1/vms/{}", followed.view.operation.target.id))
            .await?,
    )?;
    let place = view
        .host
        .as_ref()
        .map(|host| format!(" on {}", host.name))
        .unwrap_or_default();
    let address = view
        .ports
        .first()
        .map(|port| format!(", {}", port.ip))
        .unwrap_or_default();
    out::line(&format!("{} is {}{place}{address}", view.name, view.status.state))
}

const HEADING: Heading = Heading {
    narrow: &["NAME", "STATE", "HOST", "ADDRESS", "VCPUS", "MEMORY", "TEMPLATE"],
    wide: &["MACHINE", "GENERATION", "CREATED", "OPERATION", "ID"],
};

/// Its state in words; what is seen of a VM on a host that is not connected may be old.
fn state(view: &VmView) -> String {
    let old = if view.host_lost && view.status.state.holds_capacity() {
        " (host lost)"
    } else {
        ""
    };
    format!("{}{old}", view.status.state)
}

fn row(view: VmView, wide: bool) -> Vec<String> {
    let mut row = vec![
        view.name.to_string(),
        state(&view),
        view.host.as_ref().map(|host| host.name.to_string()).unwrap_or_default(),
        view.ports
            .iter()
            .map(|port| port.ip.to_string())
            .collect::<Vec<_>>()
            .join(","),
        view.spec.vcpus.to_string(),
        units::show_mebibytes(view.spec.memory_mib),
        view.template
            .as_ref()
            .map(|template| template.name.to_string())
            .unwrap_or_default(),
    ];
    if wide {
        row.extend([
            view.layout.machine.clone(),
            view.status.generation.to_string(),
            units::show_time(view.created_at),
            view.operation
                .map(|operation| operation.to_string())
                .unwrap_or_default(),
            view.id.to_string(),
        ]);
    }
    row
}

async fn show(session: &Session, vm: &Reference) -> Result<(), Failure> {
    let path = format!("/v1/vms/{vm}");
    if session.format.is_data() {
        return session.show(&path, |view| facts(view, &Names::default())).await;
    }
    let names = Names {
        networks: session.names("/v1/networks").await?,
        pools: session.names("/v1/pools").await?,
    };
    session.show(&path, |view| facts(view, &names)).await
}

/// What the things are called that a VM names by their ids.
#[derive(Default)]
struct Names {
    networks: BTreeMap<String, String>,
    pools: BTreeMap<String, String>,
}

fn facts(view: VmView, names: &Names) -> String {
    let called = |names: &BTreeMap<String, String>, id: String| names.get(&id).cloned().unwrap_or(id);
    let named = |name: Option<&Name>| name.map(ToString::to_string).unwrap_or_default();
    let mut lines = vec![
        ("name", view.name.to_string()),
        ("id", view.id.to_string()),
        (
            "state",
            format!("{}, since {}", state(&view), units::show_time(view.status.since)),
        ),
    ];
    lines.extend(view.status.reason.iter().map(|reason| ("reason", reason.clone())));
    lines.extend([
        ("host", named(view.host.as_ref().map(|host| &host.name))),
        ("generation", view.status.generation.to_string()),
        ("template", named(view.template.as_ref().map(|template| &template.name))),
        ("vcpus", view.spec.vcpus.to_string()),
        ("memory", units::show_mebibytes(view.spec.memory_mib)),
        (
            "machine",
            format!(
                "{}, {}, cpu {}",
                view.layout.machine, view.layout.accelerator, view.layout.cpu
            ),
        ),
    ]);
    lines.extend(view.ports.iter().map(|port| {
        let network = called(&names.networks, port.network.to_string());
        ("port", format!("{}, {}, network {network}", port.ip, port.mac))
    }));
    lines.extend(view.volumes.iter().map(|volume| {
        (
            "volume",
            format!(
                "{}, {}, {}, pool {}",
                units::show_bytes(volume.size_bytes),
                volume.format.as_str(),
                volume.id,
                called(&names.pools, volume.pool.to_string())
            ),
        )
    }));
    lines.extend(view.operation.map(|operation| ("operation", operation.to_string())));
    lines.push(("created", units::show_time(view.created_at)));
    table::facts(&lines)
}
