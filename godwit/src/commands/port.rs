//! `godwit port`: VMs' attachments to networks, and what they let through.

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::ArgValueCompleter;
use model::{
    command::{LimitChange, PortChange},
    name::Reference,
    policy::{Cidr, RateLimit},
    query::PortView,
};

use super::{Heading, Session, completion};
use crate::{
    exit::Failure,
    out::{self, table, units},
};

/// What can be done with ports.
#[derive(Subcommand, Debug)]
pub(crate) enum Port {
    /// List ports of VMs
    List,
    /// Show a port, and what went through it
    Show {
        /// Its id, or the VM that has no other
        #[arg(add = ArgValueCompleter::new(completion::vms))]
        port: Reference,
    },
    /// Change what a port lets through, at once; what is left out stays
    Set(Box<Set>),
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Link {
    Up,
    Down,
}

/// What becomes different at a port.
#[derive(Args, Debug)]
pub(crate) struct Set {
    /// Its id, or the VM that has no other
    #[arg(add = ArgValueCompleter::new(completion::vms))]
    port: Reference,
    /// Let frames through, or none at all
    #[arg(long, value_enum)]
    link: Option<Link>,
    /// Its security group, in place of those that it has; give it again for more
    #[arg(long = "security-group", value_name = "GROUP", add = ArgValueCompleter::new(completion::security_groups))]
    security_groups: Vec<Reference>,
    /// No security group: it is not filtered
    #[arg(long, conflicts_with = "security_groups")]
    no_security_group: bool,
    /// Addresses beyond its own from which its guest may send, in place of those; give it again for more
    #[arg(long = "allow-address", value_name = "CIDR")]
    allow_addresses: Vec<Cidr>,
    /// Only its own addresses
    #[arg(long, conflicts_with = "allow_addresses")]
    no_allow_address: bool,
    /// Most that passes in each direction, bytes a second such as 1M, or none
    #[arg(long, value_parser = rate, value_name = "RATE|none")]
    rate_limit: Option<Limit>,
    /// Most that its guest is sent, in place of --rate-limit
    #[arg(long, value_parser = rate, value_name = "RATE|none")]
    rate_limit_to_guest: Option<Limit>,
    /// Most that its guest sends, in place of --rate-limit
    #[arg(long, value_parser = rate, value_name = "RATE|none")]
    rate_limit_from_guest: Option<Limit>,
    /// What may pass at once after a pause, with a limit; without it, what passes in 20 ms
    #[arg(long, value_parser = units::bytes, value_name = "SIZE")]
    burst: Option<u64>,
}

/// A limit as it is given: `None` takes it away.
#[derive(Clone, Copy, Debug)]
struct Limit(Option<u64>);

fn rate(text: &str) -> Result<Limit, String> {
    match text {
        "none" => Ok(Limit(None)),
        text => units::bytes(text).map(|rate| Limit(Some(rate))),
    }
}

impl Set {
    fn change(&self) -> PortChange {
        let limit = |Limit(rate)| match rate {
            None => LimitChange::None,
            Some(bytes_per_s) => LimitChange::Limit(RateLimit {
                bytes_per_s,
                burst_bytes: self.burst,
            }),
        };
        PortChange {
            link_down: self.link.map(|link| matches!(link, Link::Down)),
            security_groups: (self.no_security_group || !self.security_groups.is_empty())
                .then(|| self.security_groups.clone()),
            allow_addresses: (self.no_allow_address || !self.allow_addresses.is_empty())
                .then(|| self.allow_addresses.clone()),
            to_guest: self.rate_limit_to_guest.or(self.rate_limit).map(limit),
            from_guest: self.rate_limit_from_guest.or(self.rate_limit).map(limit),
        }
    }
}

impl Port {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List => session.list("/v1/ports", None, HEADING, row).await,
            Self::Show { port } => session.show(&format!("/v1/ports/{port}"), facts).await,
            Self::Set(set) => {
                let path = format!("/v1/ports/{}", set.port);
                let value = session.client.patch(&path, &set.change()).await?;
                if session.format.is_data() {
                    return out::data(session.format, &value);
                }
                out::text(&facts(out::read(&value)?))
            }
        }
    }
}

const HEADING: Heading = Heading {
    narrow: &[
        "VM",
        "NETWORK",
        "ADDRESS",
        "LINK",
        "SECURITY GROUPS",
        "HOST",
        "RECEIVED",
        "SENT",
    ],
    wide: &["MAC", "ID"],
};

fn or_dash(text: Option<impl ToString>) -> String {
    text.map_or_else(|| "-".to_owned(), |text| text.to_string())
}

fn groups(view: &PortView) -> String {
    let names: Vec<String> = view
        .security_groups
        .iter()
        .map(|group| group.name.to_string())
        .collect();
    if names.is_empty() {
        "-".to_owned()
    } else {
        names.join(",")
    }
}

const fn link(view: &PortView) -> &'static str {
    if view.port.spec.link_down { "down" } else { "up" }
}

fn row(view: PortView, wide: bool) -> Vec<String> {
    let traffic = view.traffic;
    let mut row = vec![
        or_dash(view.vm_name.as_ref()),
        or_dash(view.network_name.as_ref()),
        view.port.ip.to_string(),
        link(&view).to_owned(),
        groups(&view),
        or_dash(view.host_name.as_ref()),
        or_dash(traffic.map(|traffic| units::show_bytes(traffic.received_bytes))),
        or_dash(traffic.map(|traffic| units::show_bytes(traffic.sent_bytes))),
    ];
    if wide {
        row.extend([view.port.mac.to_string(), view.port.id.to_string()]);
    }
    row
}

fn limit(limit: Option<RateLimit>) -> String {
    limit.map_or_else(
        || "none".to_owned(),
        |limit| {
            let (rate, burst) = (units::show_bytes(limit.bytes_per_s), units::show_bytes(limit.burst()));
            format!("{rate}/s, {burst} at once")
        },
    )
}

fn facts(view: PortView) -> String {
    let spec = &view.port.spec;
    let allowed: Vec<String> = spec.allowed.iter().map(Cidr::to_string).collect();
    let mut facts = vec![
        ("vm", or_dash(view.vm_name.as_ref())),
        ("id", view.port.id.to_string()),
        ("network", or_dash(view.network_name.as_ref())),
        ("address", view.port.ip.to_string()),
        ("mac", view.port.mac.to_string()),
        (
            "also allowed",
            if allowed.is_empty() {
                "-".to_owned()
            } else {
                allowed.join(", ")
            },
        ),
        ("link", link(&view).to_owned()),
        ("security groups", groups(&view)),
        ("limit to guest", limit(spec.to_guest)),
        ("limit from guest", limit(spec.from_guest)),
        ("host", or_dash(view.host_name.as_ref())),
        (
            "in force",
            if view.in_force {
                "yes"
            } else {
                "not yet: its host has not answered"
            }
            .to_owned(),
        ),
    ];
    if let Some(traffic) = view.traffic {
        let passed = |bytes, frames| format!("{} in {frames} frames", units::show_bytes(bytes));
        facts.extend([
            ("received", passed(traffic.received_bytes, traffic.received_frames)),
            ("sent", passed(traffic.sent_bytes, traffic.sent_frames)),
            ("spoofed, dropped", traffic.spoofed_frames.to_string()),
            ("to guest, dropped", traffic.filtered_to_guest_frames.to_string()),
            ("from guest, dropped", traffic.filtered_from_guest_frames.to_string()),
        ]);
    }
    table::facts(&facts)
}
