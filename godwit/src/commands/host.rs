//! `godwit host`: the machines that run VMs.

mod add;
mod remote;

use std::net::IpAddr;

use clap::Subcommand;
use clap_complete::ArgValueCompleter;
use model::{host::Link, name::Reference, query::HostView};
use serde_json::{Value, json};

use super::{Heading, Session, completion};
use crate::{
    exit::Failure,
    follow::{Wait, follow},
    out::{self, table, units},
};

/// What can be done with hosts.
#[derive(Subcommand, Debug)]
pub(crate) enum Host {
    /// List hosts
    List,
    /// Show a host
    Show {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::hosts))]
        host: Reference,
    },
    /// Add a machine as a host, over SSH
    Add(Box<add::Add>),
    /// Make a one-use token with which a host joins
    AddToken {
        /// How long it is valid
        #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(u32).range(1..), value_name = "SECONDS")]
        ttl: u32,
    },
    /// Offer a host for new VMs, or stop doing so
    Set {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::hosts))]
        host: Reference,
        /// Whether new VMs may come here
        #[arg(long, action = clap::ArgAction::Set)]
        schedulable: bool,
    },
    /// Remove a host on which no VM is, or one that is dead for good
    Remove {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::hosts))]
        host: Reference,
        /// Remove it with the VMs on it, though it is lost: you say that its machine is off and stays off. Its VMs may be started
        /// elsewhere then; if it still runs one of them, two guests will write one disk
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: Wait,
    },
}

impl Host {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List => session.list("/v1/hosts", None, HEADING, row).await,
            Self::Show { host } => session.show(&format!("/v1/hosts/{host}"), facts).await,
            Self::Add(add) => add.run(session).await,
            Self::AddToken { ttl } => add_token(session, ttl).await,
            Self::Set { host, schedulable } => {
                let path = format!("/v1/hosts/{host}");
                let value = session
                    .client
                    .patch(&path, &json!({ "schedulable": schedulable }))
                    .await?;
                if session.format.is_data() {
                    return out::data(session.format, &value);
                }
                out::text(&facts(out::read(&value)?))
            }
            Self::Remove { host, force, wait } => {
                let answer = if force {
                    let path = format!("/v1/hosts/{host}/abandon");
                    session.client.post(&path, &json!({ "machine_is_off": true })).await?
                } else {
                    let (path, what) = (format!("/v1/hosts/{host}"), format!("host {host}"));
                    match session.delete(&path, &what).await? {
                        Some(answer) => answer,
                        None => return Ok(()),
                    }
                };
                let followed = follow(&session.client, session.format, answer, wait).await?;
                said(session, followed.is_done(), &format!("host {host} is removed"))
            }
        }
    }
}

/// Says that something was done, to people.
pub(crate) fn said(session: &Session, done: bool, what: &str) -> Result<(), Failure> {
    if done && !session.format.is_data() {
        out::line(what)
    } else {
        Ok(())
    }
}

/// A new token with which a host joins, and as `join` what it is told.
async fn token(session: &Session, ttl: u32) -> Result<Value, Failure> {
    let mut value = session
        .client
        .post("/v1/hosts/tokens", &json!({ "ttl_s": ttl }))
        .await?;
    let token = value["token"].as_str().unwrap_or_default();
    value["join"] = format!("{token}@{}", session.client.server().address).into();
    Ok(value)
}

async fn add_token(session: &Session, ttl: u32) -> Result<(), Failure> {
    let value = token(session, ttl).await?;
    let join = value["join"].as_str().unwrap_or_default();
    if session.format.is_data() {
        return out::data(session.format, &value);
    }
    out::line(&format!("godwit agent --join {}", out::safe::text(join)))?;
    out::note(&format!(
        "run this on the new host within {ttl} s; the token lets one host join, once"
    ));
    let ip = session.client.server().address.host.parse::<IpAddr>();
    if ip.is_ok_and(|ip| ip.is_loopback()) {
        out::note(
            "other machines do not reach this one at that address: put in another, and give it to the controller with --name",
        );
    }
    Ok(())
}

const HEADING: Heading = Heading {
    narrow: &["NAME", "STATE", "SCHEDULABLE", "VMS", "VCPUS", "MEMORY", "ACCELERATOR"],
    wide: &["ADDRESS", "QEMU", "POOLS", "AGENT", "ID"],
};

fn state(view: &HostView) -> String {
    let word = match view.host.status.link {
        Link::Up if view.connected => "up",
        // The controller has just begun, and waits for its agent.
        Link::Up => "unknown",
        Link::Lost => "lost",
    };
    word.to_owned()
}

fn row(view: HostView, wide: bool) -> Vec<String> {
    let facts = view.host.status.facts.as_ref();
    let fact = |read: fn(&model::HostFacts) -> String| facts.map(read).unwrap_or_default();
    let mut row = vec![
        view.host.name.to_string(),
        state(&view),
        view.host.spec.schedulable.to_string(),
        view.vms.to_string(),
        format!("{}/{}", view.vcpus.used, view.vcpus.offered),
        memory(&view),
        fact(|facts| facts.hypervisor.accelerator.to_string()),
    ];
    if wide {
        row.extend([
            fact(|facts| facts.address.to_string()),
            fact(|facts| facts.hypervisor.version.clone()),
            fact(|facts| {
                facts
                    .pools
                    .iter()
                    .map(|pool| pool.name.as_str())
                    .collect::<Vec<_>>()
                    .join(",")
            }),
            fact(|facts| facts.agent_version.clone()),
            view.host.id.to_string(),
        ]);
    }
    row
}

fn memory(view: &HostView) -> String {
    format!(
        "{}/{}",
        units::show_mebibytes(view.memory_mib.used),
        units::show_mebibytes(view.memory_mib.offered)
    )
}

fn facts(view: HostView) -> String {
    let mut lines = vec![
        ("name", view.host.name.to_string()),
        ("id", view.host.id.to_string()),
        (
            "state",
            format!("{}, since {}", state(&view), units::show_time(view.host.status.since)),
        ),
        ("schedulable", view.host.spec.schedulable.to_string()),
        ("vms", view.vms.to_string()),
        ("vcpus", format!("{} of {}", view.vcpus.used, view.vcpus.offered)),
        ("memory", memory(&view)),
        ("joined", units::show_time(view.host.joined_at)),
    ];
    if let Some(facts) = &view.host.status.facts {
        let hypervisor = &facts.hypervisor;
        lines.extend([
            ("address", facts.address.to_string()),
            ("hypervisor", format!("{} {}", hypervisor.kind, hypervisor.version)),
            (
                "accelerator",
                format!("{}: {}", hypervisor.accelerator, hypervisor.accelerator_reason),
            ),
            ("agent", facts.agent_version.clone()),
        ]);
        lines.extend(facts.pools.iter().map(|pool| {
            let figures = format!(
                "{} of {} free",
                units::show_bytes(pool.free_bytes),
                units::show_bytes(pool.capacity_bytes)
            );
            let room = match pool.silent_since {
                None => figures,
                Some(since) if pool.capacity_bytes == 0 => {
                    format!("unknown: not answering since {}", units::show_time(since))
                }
                Some(since) => format!(
                    "{figures} when last seen; not answering since {}",
                    units::show_time(since)
                ),
            };
            ("pool", format!("{}: {room}", pool.name))
        }));
    }
    table::facts(&lines)
}
