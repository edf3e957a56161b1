//! The lab's wires: free subnets, bridges in the switch namespace, veth pairs.

use crate::run::{run, run_with_input};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// A switch forwards through a new cable within this: the kernel tells it of a carrier once a second at the worst.
const FORWARDING_LIMIT: Duration = Duration::from_secs(30);

/// The two subnets of a lab, both /24.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nets {
    /// Between hosts and controller; host address 0.
    pub underlay: Ipv4Addr,
    /// Of the guests; host address 0.
    pub vm: Ipv4Addr,
}

impl Nets {
    /// Address `last` on the underlay: 1 is the controller, 10 + N is host N.
    pub fn underlay_ip(&self, last: u8) -> Ipv4Addr {
        with_last(self.underlay, last)
    }

    /// Address `last` on the guests' network: 1 is the root namespace, 2 the client.
    pub fn vm_ip(&self, last: u8) -> Ipv4Addr {
        with_last(self.vm, last)
    }

    /// A pair of subnets that nothing in the root namespace routes to yet.
    ///
    /// # Errors
    /// When `ip` fails, or every candidate overlaps a route of this machine.
    pub fn free() -> Result<Nets> {
        let json = run(&["ip", "-j", "-4", "route", "show", "table", "all"])?;
        let routes: Value = serde_json::from_str(&json).context("cannot read `ip -j route`")?;
        let used = used_subnets(&routes);
        Self::candidates()
            .find(|nets| {
                used.iter()
                    .all(|net| !net.overlaps(nets.underlay) && !net.overlaps(nets.vm))
            })
            .context("no free subnets for the lab: 10.90.0.0/15 and 198.18.0.0/15 are all routed here")
    }

    /// 10.90.K/10.91.K first; then the range that RFC 2544 keeps for
    /// benchmarks, for machines whose private ranges are all routed away.
    fn candidates() -> impl Iterator<Item = Nets> {
        [(10, 90, 91), (198, 18, 19)].into_iter().flat_map(|(a, underlay, vm)| {
            (0..=255).map(move |k| Nets {
                underlay: Ipv4Addr::new(a, underlay, k, 0),
                vm: Ipv4Addr::new(a, vm, k, 0),
            })
        })
    }
}

fn with_last(net: Ipv4Addr, last: u8) -> Ipv4Addr {
    let [a, b, c, _] = net.octets();
    Ipv4Addr::new(a, b, c, last)
}

#[derive(Debug, PartialEq, Eq)]
struct Subnet {
    base: u32,
    prefix: u32,
}

impl Subnet {
    /// Whether it shares an address with the /24 at `net`.
    fn overlaps(&self, net: Ipv4Addr) -> bool {
        let prefix = self.prefix.min(24);
        let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
        (self.base ^ u32::from(net)) & mask == 0
    }
}

/// Destinations of every route but the default one.
fn used_subnets(routes: &Value) -> Vec<Subnet> {
    let destinations = routes.as_array().into_iter().flatten();
    destinations
        .filter_map(|route| route.get("dst")?.as_str())
        .filter_map(|dst| {
            let (ip, prefix) = dst.split_once('/').unwrap_or((dst, "32"));
            Some(Subnet {
                base: u32::from(ip.parse::<Ipv4Addr>().ok()?),
                prefix: prefix.parse().ok().filter(|prefix| *prefix <= 32)?,
            })
        })
        .filter(|subnet| subnet.prefix > 0)
        .collect()
}

/// Name of the lab's network namespace `part` (`sw`, `cl`, `h1` ...).
pub(crate) fn netns(id: &str, part: &str) -> String {
    format!("gw{id}-{part}")
}

/// Builds namespaces and wires for `hosts` hosts.
///
/// # Errors
/// When `ip` refuses something; the caller removes what was made.
pub(crate) fn build(id: &str, nets: Nets, hosts: u8) -> Result<()> {
    if id.is_empty() || id.len() > 8 || !id.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        bail!("the lab id `{id}` must be 1 to 8 letters or digits (it names interfaces)");
    }
    let switch = netns(id, "sw");
    run(&["ip", "netns", "add", &switch])?;
    let mut script = String::new();
    for bridge in ["br-u", "br-v"] {
        line(
            &mut script,
            format_args!("link add {bridge} type bridge forward_delay 0 stp_state 0 mcast_snooping 0"),
        );
        line(&mut script, format_args!("link set {bridge} addrgenmode none up"));
    }
    batch(Some(&switch), &script)?;
    cable(&switch, None, &format!("gw{id}-u"), "root-u", Some(nets.underlay_ip(1)))?;
    cable(&switch, None, &format!("gw{id}-v"), "root-v", Some(nets.vm_ip(1)))?;
    let client = netns(id, "cl");
    run(&["ip", "netns", "add", &client])?;
    cable(&switch, Some(&client), "vm0", "cl-v", Some(nets.vm_ip(2)))?;
    for n in 1..=hosts {
        let host = netns(id, &format!("h{n}"));
        run(&["ip", "netns", "add", &host])?;
        let address = nets.underlay_ip(10 + n);
        cable(&switch, Some(&host), "u0", &format!("h{n}-u"), Some(address))?;
        cable(&switch, Some(&host), "vm0", &format!("h{n}-v"), None)?;
    }
    forwarding(&switch, |_| true)
}

/// Waits until the switch forwards what comes through its ports of these names: the kernel tells a bridge of a new carrier
/// from a work queue, some time after both ends of the cable are up, and drops every frame until then.
fn forwarding(switch: &str, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let end = Instant::now() + FORWARDING_LIMIT;
    loop {
        let json = run(&["ip", "-n", switch, "-j", "-d", "link"])?;
        let links: Value = serde_json::from_str(&json).context("cannot read `ip -j -d link`")?;
        let mut silent = silent_ports(&links);
        silent.retain(|port| wanted(port));
        if silent.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("the lab's switch does not forward for {silent:?}");
        }
        // The carrier's notice reaches `ip monitor` before the bridge has acted on it: only its state tells.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The ports of bridges that do not forward.
fn silent_ports(links: &Value) -> BTreeSet<String> {
    let links = links.as_array().into_iter().flatten();
    links
        .filter(|link| link["linkinfo"]["info_slave_kind"] == "bridge")
        .filter(|link| link["linkinfo"]["info_slave_data"]["state"] != "forwarding")
        .filter_map(|link| link["ifname"].as_str().map(str::to_owned))
        .collect()
}

/// A veth pair from `namespace` (none: root) into the switch; the switch end's
/// name tells its bridge by its last letter.
fn cable(switch: &str, namespace: Option<&str>, near: &str, far: &str, address: Option<Ipv4Addr>) -> Result<()> {
    let bridge = if far.ends_with('u') { "br-u" } else { "br-v" };
    let mut script = String::new();
    line(
        &mut script,
        format_args!("link add {near} type veth peer name {far} netns {switch}"),
    );
    line(&mut script, format_args!("link set {near} addrgenmode none"));
    if let Some(address) = address {
        line(&mut script, format_args!("addr add {address}/24 dev {near}"));
    }
    line(&mut script, format_args!("link set {near} up"));
    if namespace.is_some() {
        line(&mut script, format_args!("link set lo up"));
    }
    batch(namespace, &script)?;
    batch(
        Some(switch),
        &format!("link set {far} addrgenmode none master {bridge} up\n"),
    )
}

/// Connects or cuts a host's cables at the switch, as pulling the plug does:
/// neither end says goodbye.
pub(crate) fn plug(id: &str, host: &str, connected: bool) -> Result<()> {
    let state = if connected { "up" } else { "down" };
    let switch = netns(id, "sw");
    batch(
        Some(&switch),
        &format!("link set {host}-u {state}\nlink set {host}-v {state}\n"),
    )?;
    if !connected {
        return Ok(());
    }
    let ends = [format!("{host}-u"), format!("{host}-v")];
    forwarding(&switch, |port| ends.iter().any(|end| end == port))
}

/// Removes what a host made in its network namespace (bridges, taps, tunnels):
/// a machine without power has none.
pub(crate) fn forget_links(id: &str, host: &str) -> Result<()> {
    let namespace = netns(id, host);
    let json = run(&["ip", "-n", &namespace, "-j", "link"])?;
    let links: Value = serde_json::from_str(&json).context("cannot read `ip -j link`")?;
    for link in links.as_array().into_iter().flatten() {
        let name = link.get("ifname").and_then(Value::as_str).unwrap_or("lo");
        if !matches!(name, "lo" | "u0" | "vm0") {
            run(&["ip", "-n", &namespace, "link", "del", name])?;
        }
    }
    Ok(())
}

fn line(script: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(script, "{arguments}");
}

/// Runs `ip` commands, one a line, in a network namespace (none: root).
pub fn batch(namespace: Option<&str>, script: &str) -> Result<()> {
    let mut argv = vec!["ip"];
    if let Some(namespace) = namespace {
        argv.extend(["-n", namespace]);
    }
    argv.extend(["-batch", "-"]);
    run_with_input(&argv, script)
        .map(drop)
        .with_context(|| format!("setting up the lab's network:\n{}", script.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_wider_or_narrower_route_is_a_collision_and_the_default_route_is_not() {
        let used = used_subnets(&json!([
            {"dst": "default", "gateway": "10.0.0.1"},
            {"dst": "10.90.0.0/16"},
            {"dst": "10.91.3.7"},
            {"dst": "0.0.0.0/0"},
        ]));
        let hits = |ip: [u8; 4]| used.iter().any(|net| net.overlaps(Ipv4Addr::from(ip)));
        assert!(hits([10, 90, 200, 0]));
        assert!(hits([10, 91, 3, 0]));
        assert!(!hits([10, 91, 4, 0]));
        assert!(!hits([10, 92, 0, 0]));
    }

    #[test]
    fn only_ports_of_a_bridge_that_do_not_forward_are_silent() {
        let port = |name: &str, state: &str| {
            json!({"ifname": name, "linkinfo": {"info_kind": "veth", "info_slave_kind": "bridge",
                "info_slave_data": {"state": state}}})
        };
        let links = json!([
            {"ifname": "lo"},
            {"ifname": "br-u", "linkinfo": {"info_kind": "bridge"}},
            port("h1-u", "forwarding"),
            port("h1-v", "disabled"),
        ]);
        assert_eq!(silent_ports(&links).into_iter().collect::<Vec<_>>(), ["h1-v"]);
    }

    #[test]
    fn the_first_choice_is_the_documented_one() {
        let first = Nets::candidates().next().unwrap();
        assert_eq!(first.underlay_ip(11), Ipv4Addr::new(10, 90, 0, 11));
        assert_eq!(first.vm_ip(2), Ipv4Addr::new(10, 91, 0, 2));
    }
}
