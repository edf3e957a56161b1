//! What a port lets through, as rules of the kernel's: the guest's own addresses always, security groups where there are any.
//!
//! ```text
//!   tap ──▶ prerouting ──map from-guest──▶ from-gw3k0…  source MAC, IP, ARP sender; no DHCP server, no RA; then filtered
//!   tap ◀── postrouting ◀──map to-guest─── to-gw3k0…    filtered
//!                                             │   ▲
//!                      what a rule allows ────┴───┴──▶ flows: goes on in both directions until it ends or falls silent
//! ```
//!
//! One table of family `bridge`, two chains a port: a frame costs one look in a map however many ports there are. What a guest sends is
//! judged before its bridge learns a MAC from it. The state of filtered connections is kept in sets of the port's own, not in the
//! kernel's connection tracking: many kernels have none for bridges, one guest cannot exhaust another's, and it can be read here and set
//! where the guest moves to ([`Network::flows`], [`Network::add_flows`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    net::IpAddr,
};

use model::{
    Mac, PortId, PortPolicy,
    policy::{Allowed, Cidr, Filter, Flow, Protocol, TCP, UDP, disjoint, link_local},
};
use serde_json::Value;

use crate::{Network, link, netlink::NetlinkError, nft::NftError, port::tap_name};

/// Flows of one port at once; more pass as long as a rule allows them in both directions.
const FLOWS_MAX: u32 = 16_384;
/// Flows of one port that end, at once.
const ENDING_MAX: u32 = 4096;
/// Others with whom a port speaks protocols without ports, at once.
const PEERS_MAX: u32 = 1024;
/// An established TCP connection may be silent for so long (RFC 5382, REQ-5: at least 2 h 4 min).
const TCP_S: u32 = 7_500;
/// So long where nothing has come back yet, or one side has said that it is over.
const SHORT_S: u32 = 120;
/// So long between datagrams (RFC 4787, REQ-5: at least 2 min).
const UDP_S: u32 = 180;
/// So long without ports: an answer to a ping.
const PEER_S: u32 = 60;
/// Flows that are set or taken away in one transaction.
const FLOWS_AT_ONCE: usize = 512;
/// Where guests ask for their metadata; no rule is needed for it.
const METADATA: &str = "169.254.169.254";

/// All ports' common part; setting it again changes nothing.
const BASE: &str = "\
add table bridge godwit
add map bridge godwit from-guest { type ifname : verdict; }
add map bridge godwit to-guest { type ifname : verdict; }
add chain bridge godwit prerouting { type filter hook prerouting priority -250; policy accept; }
add chain bridge godwit postrouting { type filter hook postrouting priority 250; policy accept; }
flush chain bridge godwit prerouting
flush chain bridge godwit postrouting
add rule bridge godwit prerouting iifname vmap @from-guest
add rule bridge godwit postrouting oifname vmap @to-guest
";

/// Whose a port is: from these its guest may send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its MAC.
    pub mac: Mac,
    /// Its addresses. The link-local address that follows from its MAC is always its own.
    pub addresses: Vec<IpAddr>,
}

/// Frames of a port that were dropped, since its rules were first set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// From the guest, with a MAC, IP address or ARP sender that is not its own, or what only a router or DHCP server sends.
    pub spoofed: u64,
    /// From the guest, which no security group allows.
    pub from_guest: u64,
    /// To the guest, which none allows.
    pub to_guest: u64,
}

/// Why a port's rules were not set, read or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} the rules of port {tap}")]
pub struct PolicyError {
    /// The tap.
    tap: String,
    /// What was being done.
    step: &'static str,
    /// Why.
    #[source]
    source: NftError,
}

/// Why rules of ports that are gone were not removed.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The taps could not be listed.
    #[error("the taps of this host cannot be listed")]
    Taps(#[from] NetlinkError),
    /// The rules could not be listed or removed.
    #[error(transparent)]
    Rules(#[from] NftError),
}

impl Network {
    /// Sets up what all ports' rules hang on; tells whether this host can have them at all.
    ///
    /// # Errors
    /// [`NftError`], without the program, the privileges or the kernel's parts.
    pub fn ensure_policies(&self) -> Result<(), NftError> {
        self.nft.apply(BASE)
    }

    /// Sets what a port lets through, in one step: frames are judged by the old rules or by the new ones. The port's tap need not be
    /// there yet. Connections that live and that the new rules allow go on; others end.
    ///
    /// # Errors
    /// [`PolicyError`]; the rules are as they were.
    pub fn set_policy(&self, id: PortId, of: &Identity, policy: &PortPolicy) -> Result<(), PolicyError> {
        let names = Names::of(id);
        let fail = failure(&names.tap, "set");
        self.nft.apply(&rules(&names, of, policy)).map_err(&fail)?;
        // Under the new rules already: nothing that they do not allow can come to the flows any more.
        let Some(filter) = &policy.filter else { return Ok(()) };
        let flows = self.flows(id)?;
        let over: Vec<Flow> = flows.into_iter().filter(|flow| !filter.allows(flow)).collect();
        self.remove_flows(&names, &over).map_err(fail)
    }

    /// Removes a port's rules and all that hangs on them. None is fine.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn remove_policy(&self, id: PortId) -> Result<(), PolicyError> {
        let names = Names::of(id);
        if let Err(error) = self.remove_limits(&names.tap) {
            tracing::warn!(tap = names.tap, %error, "what limits a port was not removed");
        }
        self.nft.apply(&removal(&names)).map_err(failure(&names.tap, "remove"))
    }

    /// Frames that were dropped, by the name of their port's tap.
    ///
    /// # Errors
    /// [`NftError`].
    pub fn drops(&self) -> Result<BTreeMap<String, Drops>, NftError> {
        let mut all: BTreeMap<String, Drops> = BTreeMap::new();
        for object in self.nft.list(&["counters", "table", "bridge", "godwit"])? {
            let counter = &object["counter"];
            let (Some(name), Some(packets)) = (counter["name"].as_str(), counter["packets"].as_u64()) else {
                continue;
            };
            let Some((what, tap)) = name.rsplit_once('-') else {
                continue;
            };
            let drops = all.entry(tap.to_owned()).or_default();
            match what {
                "spoofed" => drops.spoofed = packets,
                "filtered-from" => drops.from_guest = packets,
                "filtered-to" => drops.to_guest = packets,
                _ => {}
            }
        }
        Ok(all)
    }

    /// Removes the rules of taps that are gone, but for those of these ports.
    ///
    /// # Errors
    /// [`NftError`]; some may have been removed.
    pub fn sweep_policies(&self, keep: &BTreeSet<PortId>) -> Result<(), SweepError> {
        // In this order: a port has its tap before it has rules.
        let ruled = self.policies()?;
        let links = link::all(&mut self.slow())?;
        let mut keep: BTreeSet<String> = keep.iter().map(|port| tap_name(*port)).collect();
        keep.extend(links.into_iter().map(|link| link.name));
        for tap in ruled.into_iter().filter(|tap| !keep.contains(tap)) {
            self.remove_limits(&tap)?;
            self.nft.apply(&removal(&Names { tap }))?;
        }
        Ok(())
    }

    /// The names of taps for which there are rules, whether or not there are such taps.
    ///
    /// # Errors
    /// [`NftError`].
    pub fn policies(&self) -> Result<Vec<String>, NftError> {
        let objects = self.nft.list(&["chains", "bridge"])?;
        let ours = objects.iter().map(|object| &object["chain"]);
        let ours = ours.filter(|chain| chain["table"] == "godwit");
        let names = ours.filter_map(|chain| chain["name"].as_str()?.strip_prefix("from-"));
        Ok(names.map(str::to_owned).collect())
    }

    /// What is under way at a filtered port; nothing for one that is not.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn flows(&self, id: PortId) -> Result<Vec<Flow>, PolicyError> {
        let names = Names::of(id);
        let mut flows = vec![];
        for set in ["flows4", "flows6", "ending4", "ending6", "peers4", "peers6"] {
            let listed = self.nft.list(&["set", "bridge", "godwit", &names.set(set)]);
            let objects = match listed {
                Ok(objects) => objects,
                Err(NftError::Refused(why)) if why.contains("No such file") => continue,
                Err(source) => return Err(failure(&names.tap, "read")(source)),
            };
            let elements = objects.iter().filter_map(|object| object["set"]["elem"].as_array());
            let elements = elements.flatten().filter_map(read_flow);
            flows.extend(elements.map(|flow| Flow {
                ending: set.starts_with("ending"),
                ..flow
            }));
        }
        Ok(flows)
    }

    /// Lets flows go on that were under way at the port of a guest that came from elsewhere. Those beyond what a port may have are
    /// left out.
    ///
    /// # Errors
    /// [`PolicyError`]; some may have been set.
    pub fn add_flows(&self, id: PortId, flows: &[Flow]) -> Result<(), PolicyError> {
        let names = Names::of(id);
        let most = usize::try_from(FLOWS_MAX / 2).unwrap_or(usize::MAX);
        for some in flows[..flows.len().min(most)].chunks(FLOWS_AT_ONCE) {
            let mut commands = String::new();
            for flow in some {
                let expires_s = flow.expires_s.clamp(1, TCP_S);
                let element = element(flow, &format!(" timeout {expires_s}s"));
                line(
                    &mut commands,
                    format_args!("add element bridge godwit {} {{ {element} }}", names.set(set_of(flow))),
                );
            }
            self.nft
                .apply(&commands)
                .map_err(failure(&names.tap, "set the flows of"))?;
        }
        Ok(())
    }

    fn remove_flows(&self, names: &Names, flows: &[Flow]) -> Result<(), NftError> {
        for some in flows.chunks(FLOWS_AT_ONCE) {
            let mut commands = String::new();
            for flow in some {
                let (set, element) = (names.set(set_of(flow)), element(flow, ""));
                // Put in first: one that has just expired could not be taken out, and with it none.
                line(
                    &mut commands,
                    format_args!("add element bridge godwit {set} {{ {element} }}"),
                );
                line(
                    &mut commands,
                    format_args!("delete element bridge godwit {set} {{ {element} }}"),
                );
            }
            self.nft.apply(&commands)?;
        }
        Ok(())
    }
}

fn failure(tap: &str, step: &'static str) -> impl Fn(NftError) -> PolicyError {
    move |source| PolicyError {
        tap: tap.to_owned(),
        step,
        source,
    }
}

/// What belongs to a port, by name.
struct Names {
    tap: String,
}

impl Names {
    fn of(id: PortId) -> Self {
        Self { tap: tap_name(id) }
    }

    fn set(&self, kind: &str) -> String {
        format!("{kind}-{}", self.tap)
    }
}

fn line(to: &mut String, text: fmt::Arguments<'_>) {
    // Writing to a String does not fail.
    let _ = writeln!(to, "{text}");
}

/// Chains and counters that every port has.
fn plain_objects(names: &Names) -> String {
    let tap = &names.tap;
    let mut text = String::new();
    for chain in ["from", "to", "begun-from", "begun-to"] {
        line(&mut text, format_args!("add chain bridge godwit {chain}-{tap}"));
    }
    for counter in ["spoofed", "filtered-from", "filtered-to"] {
        line(&mut text, format_args!("add counter bridge godwit {counter}-{tap}"));
    }
    for chain in ["from", "to", "begun-from", "begun-to"] {
        line(&mut text, format_args!("flush chain bridge godwit {chain}-{tap}"));
    }
    text
}

/// Sets that a filtered port has.
fn sets(names: &Names) -> String {
    let mut text = String::new();
    for (family, address) in [("4", "ipv4_addr"), ("6", "ipv6_addr")] {
        let flow = format!("{address} . inet_proto . inet_service . inet_service");
        let peer = format!("{address} . inet_proto");
        for (kind, key, size) in [
            ("flows", &flow, FLOWS_MAX),
            ("ending", &flow, ENDING_MAX),
            ("peers", &peer, PEERS_MAX),
        ] {
            let name = names.set(&format!("{kind}{family}"));
            line(
                &mut text,
                format_args!(
                    "add set bridge godwit {name} {{ type {key}; size {size}; flags dynamic,timeout; timeout {SHORT_S}s; }}"
                ),
            );
        }
    }
    text
}

fn delete_sets(names: &Names) -> String {
    let mut text = String::new();
    for kind in ["flows4", "ending4", "peers4", "flows6", "ending6", "peers6"] {
        line(&mut text, format_args!("delete set bridge godwit {}", names.set(kind)));
    }
    text
}

/// One transaction that makes the rules what they should be, whatever they were.
fn rules(names: &Names, of: &Identity, policy: &PortPolicy) -> String {
    let tap = &names.tap;
    let mut text = format!("{BASE}{}{}", plain_objects(names), sets(names));
    if policy.filter.is_none() {
        // Put in first: what is not there could not be taken out.
        text.push_str(&delete_sets(names));
    }
    let mut from = vec![];
    let mut to = vec![];
    if policy.link_down {
        from.push("drop".to_owned());
        to.push("drop".to_owned());
    } else {
        from.extend(own_addresses(names, of, policy));
        if let Some(filter) = &policy.filter {
            from.extend(filtered(names, &FROM, filter));
            to.extend(filtered(names, &TO, filter));
            for side in [&FROM, &TO] {
                for rule in begun(names, side) {
                    line(
                        &mut text,
                        format_args!("add rule bridge godwit begun-{}-{tap} {rule}", side.name),
                    );
                }
            }
        }
    }
    for rule in from {
        line(&mut text, format_args!("add rule bridge godwit from-{tap} {rule}"));
    }
    for rule in to {
        line(&mut text, format_args!("add rule bridge godwit to-{tap} {rule}"));
    }
    for side in ["from", "to"] {
        line(
            &mut text,
            format_args!("add element bridge godwit {side}-guest {{ {tap} : goto {side}-{tap} }}"),
        );
    }
    text
}

/// One transaction after which nothing is left, whatever was there.
fn removal(names: &Names) -> String {
    let tap = &names.tap;
    let mut text = format!("{BASE}{}{}", plain_objects(names), sets(names));
    for side in ["from", "to"] {
        let element = format!("bridge godwit {side}-guest {{ {tap} : goto {side}-{tap} }}");
        line(&mut text, format_args!("add element {element}"));
        line(
            &mut text,
            format_args!("delete element bridge godwit {side}-guest {{ {tap} }}"),
        );
    }
    for chain in ["from", "to", "begun-from", "begun-to"] {
        line(&mut text, format_args!("delete chain bridge godwit {chain}-{tap}"));
    }
    text.push_str(&delete_sets(names));
    for counter in ["spoofed", "filtered-from", "filtered-to"] {
        line(&mut text, format_args!("delete counter bridge godwit {counter}-{tap}"));
    }
    text
}

/// `{ a, b }` of ranges of one family; `None` where everything is in them.
fn elements(ranges: impl IntoIterator<Item = Cidr>, v4: bool) -> Option<String> {
    let ranges = disjoint(ranges.into_iter().filter(|range| range.address().is_ipv4() == v4));
    if ranges.iter().any(|range| range.prefix() == 0) {
        return None;
    }
    let texts: Vec<String> = ranges.iter().map(Cidr::to_string).collect();
    Some(format!("{{ {} }}", texts.join(", ")))
}

/// Only a guest's own addresses as the source of anything, and nothing that only routers and DHCP servers send.
fn own_addresses(names: &Names, of: &Identity, policy: &PortPolicy) -> Vec<String> {
    let mac = of.mac;
    let own = || {
        let own = of.addresses.iter().copied().map(Cidr::one);
        let own = own.chain(policy.allowed.iter().copied());
        own.chain([Cidr::one(link_local(mac).into())])
    };
    let none = |address: &str| address.parse().ok().map(Cidr::one);
    let spoofed = format!("counter name spoofed-{} drop", names.tap);
    let mut rules = vec![
        format!("ether saddr != {mac}"),
        // RARP is what a hypervisor announces a guest with. Tags, which would hide what is in them, are none of these.
        "ether type != { ip, arp, 0x8035, ip6 }".to_owned(),
        "ether type arp arp htype != 1".to_owned(),
        "ether type arp arp ptype != ip".to_owned(),
        "ether type arp arp hlen != 6".to_owned(),
        "ether type arp arp plen != 4".to_owned(),
        format!("ether type arp arp saddr ether != {mac}"),
        "ip saddr 0.0.0.0 meta l4proto != udp".to_owned(),
        "ip saddr 0.0.0.0 udp dport != 67".to_owned(),
        "ether type ip udp sport 67".to_owned(),
        "ether type ip icmp type redirect".to_owned(),
        "ether type ip6 udp sport 547".to_owned(),
        "icmpv6 type { nd-router-advert, nd-redirect }".to_owned(),
        "ip6 saddr :: meta l4proto != icmpv6".to_owned(),
        // 131 and 143: a guest says which groups it listens to before it has an address.
        "ip6 saddr :: icmpv6 type != { nd-neighbor-solicit, nd-router-solicit, 131, 143 }".to_owned(),
    ];
    if let Some(own) = elements(own().chain(none("0.0.0.0")), true) {
        rules.push(format!("ether type arp arp saddr ip != {own}"));
        rules.push(format!("ether type ip ip saddr != {own}"));
    }
    if let Some(own6) = elements(own().chain(none("::")), false) {
        rules.push(format!("ether type ip6 ip6 saddr != {own6}"));
        // The target of an advertisement, which others take into their tables: bytes 8 to 23.
        let targets: Vec<String> = own().filter_map(not_target).collect();
        rules.push(format!("icmpv6 type nd-neighbor-advert {}", targets.join(" ")));
    }
    rules.into_iter().map(|rule| format!("{rule} {spoofed}")).collect()
}

/// Matches neighbour advertisements whose target is not in a range of IPv6. By its bits: not every `nft` has a name for it.
fn not_target(range: Cidr) -> Option<String> {
    let IpAddr::V6(address) = range.address() else {
        return None;
    };
    let prefix = range.prefix();
    let bits = u128::from(address).checked_shr(128 - u32::from(prefix)).unwrap_or(0);
    Some(format!("@th,64,{prefix} != {bits:#x}"))
}

/// One of the two directions.
struct Side {
    name: &'static str,
    /// Where the other side stands in a packet of this direction.
    remote: &'static str,
    /// Where the guest's and the other's ports stand.
    guest_port: &'static str,
    remote_port: &'static str,
    /// What passes without a rule: what a host needs to have addresses and find others at all.
    always: &'static [&'static str],
}

const FROM: Side = Side {
    name: "from",
    remote: "daddr",
    guest_port: "th sport",
    remote_port: "th dport",
    always: &[
        "ether type ip udp sport 68 udp dport 67",
        "ether type ip6 udp sport 546 udp dport 547",
        "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, 131, 132, 143 }",
    ],
};

const TO: Side = Side {
    name: "to",
    remote: "saddr",
    guest_port: "th dport",
    remote_port: "th sport",
    always: &[
        "ether type ip udp sport 67 udp dport 68",
        "ether type ip6 udp sport 547 udp dport 546",
        "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert, 130 }",
    ],
};

impl Side {
    /// A flow, as a packet of this direction names it.
    fn flow(&self, ip: &str) -> String {
        format!(
            "{ip} {} . meta l4proto . {} . {}",
            self.remote, self.guest_port, self.remote_port
        )
    }

    /// The other side of a protocol without ports.
    fn peer(&self, ip: &str) -> String {
        format!("{ip} {} . meta l4proto", self.remote)
    }
}

/// What goes on, and what the security groups allow to begin.
fn filtered(names: &Names, side: &Side, filter: &Filter) -> Vec<String> {
    let (tap, name) = (&names.tap, side.name);
    let mut rules = vec!["ether type { arp, 0x8035 } accept".to_owned()];
    rules.extend(side.always.iter().map(|rule| format!("{rule} accept")));
    rules.push(format!("ip {} {METADATA} accept", side.remote));
    // Without them no path's packet size is found. They name what they are about; no kernel answers those that are about nothing.
    rules.push("icmp type { destination-unreachable, time-exceeded, parameter-problem } accept".to_owned());
    // 1 to 4, as above and packet-too-big.
    rules.push("icmpv6 type 1-4 accept".to_owned());
    // Without its first fragment, which is judged, the rest of a packet is nothing.
    rules.push("ip frag-off & 0x1fff != 0 accept".to_owned());
    for (ip, family) in [("ip", "4"), ("ip6", "6")] {
        let (flows, ending, peers) = (
            names.set(&format!("flows{family}")),
            names.set(&format!("ending{family}")),
            names.set(&format!("peers{family}")),
        );
        let (flow, peer) = (side.flow(ip), side.peer(ip));
        rules.extend([
            // The same ports again, for another connection.
            format!("ether type {ip} tcp flags & (fin | syn | rst | ack) == syn delete @{ending} {{ {flow} }}"),
            format!("ether type {ip} meta l4proto tcp {flow} @{ending} update @{ending} {{ {flow} timeout {SHORT_S}s }} accept"),
            format!(
                "ether type {ip} tcp flags & (fin | rst) != 0 {flow} @{flows} \
                 update @{ending} {{ {flow} timeout {SHORT_S}s }} delete @{flows} {{ {flow} }} accept"
            ),
            format!("ether type {ip} meta l4proto tcp {flow} @{flows} update @{flows} {{ {flow} timeout {TCP_S}s }} accept"),
            format!("ether type {ip} meta l4proto udp {flow} @{flows} update @{flows} {{ {flow} timeout {UDP_S}s }} accept"),
            format!("ether type {ip} {peer} @{peers} update @{peers} {{ {peer} timeout {PEER_S}s }} accept"),
        ]);
    }
    let allowed = if name == FROM.name {
        &filter.egress
    } else {
        &filter.ingress
    };
    for rule in allowed {
        let matches = begins(rule, side);
        rules.extend(
            matches
                .into_iter()
                .map(|rule| format!("{rule} goto begun-{name}-{tap}")),
        );
    }
    rules.push(format!("counter name filtered-{name}-{tap} drop"));
    rules
}

/// What matches the first packet of what a rule allows; one for each family that it speaks of.
fn begins(rule: &Allowed, side: &Side) -> Vec<String> {
    let protocol = match rule.protocol {
        Protocol::Any => String::new(),
        Protocol::Icmp => "meta l4proto { icmp, icmpv6 }".to_owned(),
        protocol => format!("meta l4proto {protocol}"),
    };
    let ports = rule
        .ports
        .map_or_else(String::new, |ports| format!(" th dport {ports}"));
    let all = format!("{protocol}{ports}");
    let Some(remote) = &rule.remote else {
        return vec![if all.is_empty() {
            "ether type { ip, ip6 }".to_owned()
        } else {
            all
        }];
    };
    let of = |v4: bool, ip: &str| {
        let ranges = remote.iter().copied().filter(|range| range.address().is_ipv4() == v4);
        let some = ranges.clone().next().is_some();
        some.then(|| match elements(ranges, v4) {
            Some(elements) => format!("ether type {ip} {ip} {} {elements} {all}", side.remote),
            None => format!("ether type {ip} {all}"),
        })
    };
    [of(true, "ip"), of(false, "ip6")].into_iter().flatten().collect()
}

/// Remembers what a rule allowed, so that it goes on in both directions. Where there is no room for more it passes by its rule alone.
fn begun(names: &Names, side: &Side) -> Vec<String> {
    let mut rules = vec![];
    for (ip, family) in [("ip", "4"), ("ip6", "6")] {
        let (flows, peers) = (
            names.set(&format!("flows{family}")),
            names.set(&format!("peers{family}")),
        );
        let (flow, peer) = (side.flow(ip), side.peer(ip));
        rules.push(format!(
            "ether type {ip} meta l4proto {{ tcp, udp }} update @{flows} {{ {flow} timeout {SHORT_S}s }} accept"
        ));
        rules.push(format!(
            "ether type {ip} meta l4proto != {{ tcp, udp }} update @{peers} {{ {peer} timeout {PEER_S}s }} accept"
        ));
    }
    rules.push("accept".to_owned());
    rules
}

const fn set_of(flow: &Flow) -> &'static str {
    let ports = flow.protocol == TCP || flow.protocol == UDP;
    match (flow.remote, flow.ending) {
        (IpAddr::V4(_), _) if !ports => "peers4",
        (IpAddr::V6(_), _) if !ports => "peers6",
        (IpAddr::V4(_), false) => "flows4",
        (IpAddr::V6(_), false) => "flows6",
        (IpAddr::V4(_), true) => "ending4",
        (IpAddr::V6(_), true) => "ending6",
    }
}

fn element(flow: &Flow, timeout: &str) -> String {
    let Flow {
        remote,
        protocol,
        guest_port,
        remote_port,
        ..
    } = flow;
    match set_of(flow) {
        "peers4" | "peers6" => format!("{remote} . {protocol}{timeout}"),
        _ => format!("{remote} . {protocol} . {guest_port} . {remote_port}{timeout}"),
    }
}

/// An element as `nft` prints it; `None` for what is no flow.
fn read_flow(element: &Value) -> Option<Flow> {
    let element = &element["elem"];
    let parts = element["val"]["concat"].as_array()?;
    let number = |at: usize| match parts.get(at) {
        None => Some(0),
        Some(part) => part.as_u64().and_then(|number| u16::try_from(number).ok()),
    };
    let protocol = match parts.get(1)? {
        Value::String(name) => match name.as_str() {
            "icmp" => 1,
            "tcp" => TCP,
            "udp" => UDP,
            "ipv6-icmp" | "icmpv6" => 58,
            other => other.parse().ok()?,
        },
        other => u8::try_from(other.as_u64()?).ok()?,
    };
    Some(Flow {
        remote: parts.first()?.as_str()?.parse().ok()?,
        protocol,
        guest_port: number(2)?,
        remote_port: number(3)?,
        ending: false,
        expires_s: element["expires"]
            .as_u64()
            .and_then(|s| u32::try_from(s).ok())
            .unwrap_or(1),
    })
}
