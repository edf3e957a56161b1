//! `godwit network addressing`: what guests of a network are told beside their IPv4 addresses, and how.

use std::net::{IpAddr, Ipv6Addr};

use clap::{Args, ValueEnum};
use clap_complete::ArgValueCompleter;
use model::{
    addressing::{Addressing, AddressingMethod, MetadataAccess, V6_PREFIX_LENGTH, V6Prefix},
    name::Reference,
    query::NetworkView,
};

use super::{ITEMS_MAX, Session, completion, host::said};
use crate::{
    exit::{Exit, Failure},
    out::{self, table},
};

/// What guests are told; what is left out stays.
#[derive(Args, Debug)]
pub(crate) struct Told {
    /// Name or id
    #[arg(add = ArgValueCompleter::new(completion::networks))]
    name: Reference,
    /// How guests learn their addresses
    #[arg(long, value_enum)]
    method: Option<Method>,
    /// The IPv6 prefix of its guests, of 64 bits; only while it has no VMs
    #[arg(long, value_parser = prefix, value_name = "PREFIX/64|none")]
    ipv6: Option<Wish<Ipv6Addr>>,
    /// The link-local address of its IPv6 router
    #[arg(long, value_parser = address, value_name = "ADDRESS|none")]
    gateway6: Option<Wish<Ipv6Addr>>,
    /// A name server; as often as needed, at most 4
    #[arg(long = "dns", value_name = "ADDRESS", conflicts_with = "no_dns")]
    dns: Vec<IpAddr>,
    /// No name servers
    #[arg(long)]
    no_dns: bool,
    /// The domain in which guests look for short names
    #[arg(long, value_parser = domain, value_name = "DOMAIN|none")]
    search: Option<Wish<String>>,
    /// How long a guest may keep its address before it asks again, 120 to 604800
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(120..=604_800))]
    lease: Option<u32>,
    /// Whether guests may ask their host about themselves, at 169.254.169.254
    #[arg(long, value_enum)]
    metadata: Option<Metadata>,
    /// Say whether it can be said, and do nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Method {
    /// Their seed has them; hosts answer no DHCP
    Static,
    /// They ask by DHCP, and their host answers
    Dhcp,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Metadata {
    /// With a session token only (IMDSv2)
    Token,
    /// Also without one
    Open,
    /// They may not
    Off,
}

/// Something, or that there is to be none.
#[derive(Clone, Debug)]
struct Wish<T>(Option<T>);

fn wish<T>(text: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Wish<T>, String> {
    match text {
        "none" => Ok(Wish(None)),
        text => read(text).map(|value| Wish(Some(value))),
    }
}

fn prefix(text: &str) -> Result<Wish<Ipv6Addr>, String> {
    let wrong = || format!("{text} is no prefix of {V6_PREFIX_LENGTH} bits; give fd00:91::/64, say");
    wish(text, |text| {
        let address = text.strip_suffix("/64").ok_or_else(wrong)?;
        address.parse().map_err(|_| wrong())
    })
}

fn address(text: &str) -> Result<Wish<Ipv6Addr>, String> {
    wish(text, |text| {
        text.parse()
            .map_err(|_| format!("{text} is no IPv6 address; give fe80::1, say"))
    })
}

fn domain(text: &str) -> Result<Wish<String>, String> {
    wish(text, |text| Ok(text.to_owned()))
}

impl Told {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let items = session.client.list("/v1/networks", ITEMS_MAX).await?;
        let views = items
            .iter()
            .map(out::read)
            .collect::<Result<Vec<NetworkView>, Failure>>()?;
        let meant = |view: &&NetworkView| match &self.name {
            Reference::Id(id) => view.network.id.0 == *id,
            Reference::Name(name) => view.network.name == *name,
        };
        let present = views.iter().find(meant).map(|view| view.network.addressing.clone());
        let missing = || Failure::new(Exit::NotFound, format!("there is no network {}", self.name));
        let wanted = self.over(present.ok_or_else(missing)?)?;
        let dry_run = if self.dry_run { "?dry_run=true" } else { "" };
        let path = format!("/v1/networks/{}/addressing{dry_run}", self.name);
        session.client.put(&path, &wanted).await?;
        if session.format.is_data() {
            let shown = serde_json::to_value(&wanted).expect("what guests are told has a JSON form");
            return out::data(session.format, &shown);
        }
        if self.dry_run {
            return said(
                session,
                true,
                &format!("guests of network {} can be told this", self.name),
            );
        }
        out::text(&table::facts(&facts(&wanted)))
    }

    fn over(&self, present: Addressing) -> Result<Addressing, Failure> {
        let v6 = match &self.ipv6 {
            Some(Wish(address)) => address.map(|address| V6Prefix {
                address,
                gateway: present.v6.and_then(|v6| v6.gateway),
            }),
            None => present.v6,
        };
        let v6 = match (v6, &self.gateway6) {
            (Some(v6), Some(Wish(gateway))) => Some(V6Prefix {
                gateway: *gateway,
                ..v6
            }),
            (None, Some(Wish(Some(_)))) => {
                let message = "a network without an IPv6 prefix has no IPv6 router; give --ipv6 as well";
                return Err(Failure::new(Exit::Usage, message));
            }
            (v6, _) => v6,
        };
        Ok(Addressing {
            method: match self.method {
                Some(Method::Static) => AddressingMethod::Static,
                Some(Method::Dhcp) => AddressingMethod::Dhcp,
                None => present.method,
            },
            v6,
            dns: match (self.dns.is_empty(), self.no_dns) {
                (false, _) => self.dns.clone(),
                (true, true) => vec![],
                (true, false) => present.dns,
            },
            search: match &self.search {
                Some(Wish(search)) => search.clone(),
                None => present.search,
            },
            lease_s: self.lease.unwrap_or(present.lease_s),
            metadata: match self.metadata {
                Some(Metadata::Token) => MetadataAccess::Token,
                Some(Metadata::Open) => MetadataAccess::Open,
                Some(Metadata::Off) => MetadataAccess::Off,
                None => present.metadata,
            },
        })
    }
}

/// What guests are told, for people.
pub(crate) fn facts(told: &Addressing) -> [(&'static str, String); 7] {
    let none = || "none".to_owned();
    let servers: Vec<String> = told.dns.iter().map(ToString::to_string).collect();
    [
        (
            "addresses by",
            match told.method {
                AddressingMethod::Static => "seed".to_owned(),
                AddressingMethod::Dhcp => "DHCP".to_owned(),
            },
        ),
        (
            "ipv6",
            told.v6
                .map_or_else(none, |v6| format!("{}/{V6_PREFIX_LENGTH}", v6.address)),
        ),
        (
            "ipv6 router",
            told.v6.and_then(|v6| v6.gateway).map_or_else(none, |ip| ip.to_string()),
        ),
        (
            "name servers",
            if servers.is_empty() { none() } else { servers.join(",") },
        ),
        ("search", told.search.clone().unwrap_or_else(none)),
        ("lease", format!("{} s", told.lease_s)),
        (
            "metadata",
            match told.metadata {
                MetadataAccess::Token => "with a token",
                MetadataAccess::Open => "open",
                MetadataAccess::Off => "off",
            }
            .to_owned(),
        ),
    ]
}
