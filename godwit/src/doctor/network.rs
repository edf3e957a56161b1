//! What VMs' networks need: kinds of interface, filters, settings of the kernel, packet sizes, the bridge.

use network::{LinkKind, TrialError, in_throwaway_namespace};

use super::{Check, Checks, Look, Topic, process, topic};
use crate::exit::chain;

/// What is tried in a namespace that goes away.
pub(super) const TRIED: &[&Topic] = &[&topic::NET_KINDS, &topic::NFTABLES];
/// What is read.
pub(super) const TOPICS: &[&Topic] = &[
    &topic::NET_TOOLS,
    &topic::BRIDGE_FILTER,
    &topic::FORWARDING,
    &topic::REVERSE_PATH,
    &topic::MTU,
    &topic::BRIDGE,
];

/// What the network crate writes on bridges of its own.
const OWN_ALIAS: &str = "godwit bridge";
/// Outer Ethernet, IPv4, UDP and VXLAN headers (RFC 7348).
const VXLAN_BYTES: u32 = 50;
/// The least that IPv6 asks of a link (RFC 8200).
const IPV6_MTU_MIN: u32 = 1280;
/// What the kernel must offer to filter guests' frames.
const RULES: &str = "add table bridge godwit_try; add chain bridge godwit_try c { type filter hook forward priority 0; }; \
     add rule bridge godwit_try c ether saddr 02:00:00:00:00:01 counter accept";

type Tried = (Vec<(LinkKind, Result<(), String>)>, Option<Result<(), String>>);

pub(super) fn try_kinds(look: &Look) -> Checks {
    let skipped = |why: &str| TRIED.iter().map(|topic| Check::needs_root(topic, why)).collect();
    if !look.is_real || !look.is_root {
        return skipped("only root can make a network namespace to try in");
    }
    let has_nft = look.program("nft").is_some();
    let tried = in_throwaway_namespace(move |here| -> Tried {
        let kinds = LinkKind::ALL
            .into_iter()
            .map(|kind| (kind, here.try_link(kind).map_err(|error| chain(&error))))
            .collect();
        // The program is in the namespace, too.
        let nft = has_nft.then(|| process::first_line("nft", &[RULES]).map(|_| ()));
        (kinds, nft)
    });
    match tried {
        Ok((kinds, nft)) => vec![kinds_tried(look, &kinds), nft_tried(look, nft)],
        Err(TrialError::Namespace(error)) => {
            let mend = "use a distribution's kernel (CONFIG_NET_NS=y), and no container without CAP_SYS_ADMIN";
            let seen = format!("a network namespace cannot be made: {error}");
            TRIED
                .iter()
                .map(|topic| Check::skipped(topic, &seen).mend(mend))
                .collect()
        }
        Err(error) => skipped(&chain(&error)),
    }
}

fn kinds_tried(look: &Look, tried: &[(LinkKind, Result<(), String>)]) -> Check {
    let topic = &topic::NET_KINDS;
    let failed: Vec<_> = tried
        .iter()
        .filter_map(|(kind, result)| Some((*kind, result.as_ref().err()?)))
        .collect();
    if failed.is_empty() {
        let names: Vec<_> = tried.iter().map(|(kind, _)| kind.module()).collect();
        return Check::ok(topic, format!("made one of each: {}", names.join(", ")));
    }
    let seen: Vec<_> = failed
        .iter()
        .map(|(kind, why)| format!("{}: {why}", kind.module()))
        .collect();
    let modules: Vec<_> = failed.iter().map(|(kind, _)| kind.module()).collect();
    let mend = format!(
        "{}; where there is no such module, use a distribution's kernel",
        look.command(&format!("modprobe -a {}", modules.join(" ")))
    );
    // Without a bridge and taps there is no VM with a network; the others are for more than one host or network.
    let stops = failed
        .iter()
        .any(|(kind, _)| matches!(kind, LinkKind::Bridge | LinkKind::Tap));
    let check = if stops { Check::problem } else { Check::warning };
    check(topic, seen.join("; "), mend)
}

fn nft_tried(look: &Look, tried: Option<Result<(), String>>) -> Check {
    let topic = &topic::NFTABLES;
    match tried {
        None => Check::skipped(topic, "there is no nft to try with").mend(look.install("nftables", "nftables")),
        Some(Ok(())) => Check::ok(topic, "a bridge filter was made"),
        Some(Err(why)) => Check::warning(
            topic,
            why,
            format!(
                "{}; where there is no such module, use a distribution's kernel",
                look.command("modprobe -a nf_tables nft_meta_bridge")
            ),
        ),
    }
}

pub(super) fn look(look: &Look) -> Checks {
    vec![
        tools(look),
        bridge_filter(look),
        forwarding(look),
        reverse_path(look),
        mtu(look),
        bridge(look),
    ]
}

fn tools(look: &Look) -> Check {
    let needed = [("ip", "iproute2"), ("nft", "nftables")];
    let (there, missing): (Vec<_>, Vec<_>) = needed
        .into_iter()
        .partition(|(program, _)| look.program(program).is_some());
    let names = |tools: &[(&'static str, &'static str)], nth: fn(&(&'static str, &'static str)) -> &'static str| {
        tools.iter().map(nth).collect::<Vec<_>>().join(" ")
    };
    if missing.is_empty() {
        return Check::ok(&topic::NET_TOOLS, names(&there, |tool| tool.0));
    }
    let packages = names(&missing, |tool| tool.1);
    Check::warning(
        &topic::NET_TOOLS,
        format!("missing: {}", names(&missing, |tool| tool.0)),
        look.install(&packages, &packages),
    )
}

fn bridge_filter(look: &Look) -> Check {
    let topic = &topic::BRIDGE_FILTER;
    let path = |name: &str| format!("/proc/sys/net/bridge/bridge-nf-call-{name}");
    let on: Vec<_> = ["iptables", "ip6tables", "arptables"]
        .into_iter()
        .filter(|name| look.number(path(name)) == Some(1))
        .collect();
    if on.is_empty() {
        return Check::ok(topic, "frames between VMs pass by the host's firewall");
    }
    let lines: Vec<_> = on
        .iter()
        .map(|name| look.sysctl(&format!("net.bridge.bridge-nf-call-{name} = 0")))
        .collect();
    Check::warning(
        topic,
        format!("frames between VMs go through {}", on.join(", ")),
        lines.join(" && "),
    )
}

fn forwarding(look: &Look) -> Check {
    let topic = &topic::FORWARDING;
    match look.number("/proc/sys/net/ipv4/ip_forward") {
        Some(1) => Check::ok(topic, "net.ipv4.ip_forward = 1"),
        Some(_) => Check::warning(
            topic,
            "net.ipv4.ip_forward = 0: no matter where the uplink is bridged and another machine routes",
            look.sysctl("net.ipv4.ip_forward = 1"),
        ),
        None => Check::skipped(topic, "/proc/sys/net cannot be read").mend("run outside of the container"),
    }
}

fn reverse_path(look: &Look) -> Check {
    let topic = &topic::REVERSE_PATH;
    let top = "/proc/sys/net/ipv4/conf";
    let value = |name: &str| look.number(format!("{top}/{name}/rp_filter")).unwrap_or(0);
    let all = value("all");
    // The larger of `all` and the interface's own counts.
    let strict: Vec<String> = look
        .names(top)
        .into_iter()
        .filter(|name| !matches!(name.as_str(), "all" | "default" | "lo"))
        .filter(|name| value(name).max(all) == 1)
        .collect();
    if strict.is_empty() {
        return Check::ok(topic, "not strict");
    }
    let shown = super::some(&strict);
    Check::warning(
        topic,
        format!("strict on {shown}: no matter with a single uplink"),
        look.sysctl("net.ipv4.conf.all.rp_filter = 2"),
    )
}

/// The interface of the default route.
fn way_out(look: &Look) -> Option<String> {
    let routes = look.read("/proc/net/route").ok()?;
    routes.lines().skip(1).find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (interface, destination) = (words.next()?, words.next()?);
        (destination == "00000000").then(|| interface.to_owned())
    })
}

fn mtu(look: &Look) -> Check {
    let topic = &topic::MTU;
    let wanted = look.asked.mtu;
    let of = |interface: &str| look.number(format!("/sys/class/net/{interface}/mtu"));
    if let Some(uplink) = &look.asked.uplink {
        let Some(mtu) = of(uplink).and_then(|mtu| u32::try_from(mtu).ok()) else {
            let there: Vec<_> = look.names("/sys/class/net");
            let seen = format!("there is no interface {uplink}; there are {}", super::some(&there));
            return Check::problem(topic, seen, "name the uplink as `ip link` shows it");
        };
        if mtu < wanted {
            let set = look.command(&format!("ip link set {uplink} mtu {wanted}"));
            let mend = format!("start the agent with --mtu {mtu}; or, if the switch carries it: {set}");
            let seen = format!("{uplink} carries {mtu} bytes, the bridge {wanted}");
            return Check::problem(topic, seen, mend);
        }
        return Check::ok(topic, carried(uplink, mtu));
    }
    let Some((interface, mtu)) = way_out(look).and_then(|name| of(&name).map(|mtu| (name, mtu))) else {
        return Check::skipped(topic, "no route leads out, and no --uplink is named")
            .mend("name it: --uplink INTERFACE");
    };
    let mtu = u32::try_from(mtu).unwrap_or(u32::MAX);
    if mtu < IPV6_MTU_MIN + VXLAN_BYTES {
        let set = look.command(&format!("ip link set {interface} mtu 1500"));
        return Check::warning(topic, carried(&interface, mtu), set);
    }
    Check::ok(topic, carried(&interface, mtu))
}

fn carried(interface: &str, mtu: u32) -> String {
    let inner = mtu.saturating_sub(VXLAN_BYTES);
    format!("{interface} carries {mtu} bytes, networks over VXLAN {inner}")
}

fn bridge(look: &Look) -> Check {
    let topic = &topic::BRIDGE;
    let name = &look.asked.bridge;
    let place = format!("/sys/class/net/{name}");
    if !look.exists(&place) {
        return Check::ok(topic, format!("{name} is not there yet; the agent makes it"));
    }
    let other = "start the agent with --bridge ANOTHER-NAME";
    if !look.exists(format!("{place}/bridge")) {
        return Check::problem(topic, format!("{name} is an interface of another kind"), other);
    }
    let ports = look.names(format!("{place}/brif")).len();
    if look
        .read(format!("{place}/ifalias"))
        .is_ok_and(|alias| alias == OWN_ALIAS)
    {
        return Check::ok(topic, format!("{name} is Godwit's, with {ports} ports"));
    }
    Check::warning(
        topic,
        format!("{name} was made by others; it is used as it is, with its {ports} ports"),
        format!("if that is not meant, {other}"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::{State, look::tests::empty};
    use super::*;

    #[test]
    fn the_firewall_over_bridges_is_told_with_the_lines_that_end_it() {
        let off = empty().with("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
        assert_eq!(bridge_filter(&off.look()).state, State::Ok);
        assert_eq!(
            bridge_filter(&empty().look()).state,
            State::Ok,
            "the module is not loaded"
        );
        let on = empty().with("/proc/sys/net/bridge/bridge-nf-call-ip6tables", "1\n");
        let check = bridge_filter(&on.look());
        assert_eq!(check.state, State::Warning);
        assert!(check.mend.unwrap().contains("net.bridge.bridge-nf-call-ip6tables = 0"));
    }

    #[test]
    fn forwarding_and_strictness_are_read_as_the_kernel_reads_them() {
        let forwards = |value: &str| forwarding(&empty().with("/proc/sys/net/ipv4/ip_forward", value).look()).state;
        assert_eq!((forwards("1"), forwards("0")), (State::Ok, State::Warning));
        assert_eq!(forwarding(&empty().look()).state, State::Skipped);
        let strict = |all: &str, eth0: &str| {
            let fake = empty().with("/proc/sys/net/ipv4/conf/all/rp_filter", all);
            reverse_path(&fake.with("/proc/sys/net/ipv4/conf/eth0/rp_filter", eth0).look())
        };
        assert_eq!(strict("0", "0").state, State::Ok);
        assert_eq!(strict("2", "1").state, State::Ok, "the larger counts");
        assert_eq!(strict("1", "0").state, State::Warning);
        assert!(strict("0", "1").seen.contains("eth0"));
    }

    #[test]
    fn an_uplink_carries_what_the_bridge_does_or_it_is_said() {
        let link = |mtu: &str| empty().with("/sys/class/net/eth1/mtu", mtu);
        let mut fake = link("1500\n");
        fake.asked.uplink = Some("eth1".to_owned());
        assert_eq!(mtu(&fake.look()).state, State::Ok);
        fake.asked.mtu = 9000;
        let small = mtu(&fake.look());
        assert_eq!(small.state, State::Problem);
        assert!(small.mend.unwrap().contains("ip link set eth1 mtu 9000"));
        fake.asked.uplink = Some("eth7".to_owned());
        assert!(mtu(&fake.look()).seen.contains("no interface eth7; there are eth1"));
        let route = "Iface\tDestination\tGateway\neth1\t00000000\t0100000A\n";
        let out = |mtu_: &str| mtu(&link(mtu_).with("/proc/net/route", route).look());
        assert_eq!(out("1500").seen, "eth1 carries 1500 bytes, networks over VXLAN 1450");
        assert_eq!(out("1300").state, State::Warning);
        assert_eq!(mtu(&empty().look()).state, State::Skipped);
    }

    #[test]
    fn a_bridge_is_ours_anothers_or_no_bridge() {
        assert_eq!(bridge(&empty().look()).state, State::Ok);
        let other = || empty().with("/sys/class/net/godwit0/bridge/stp_state", "0");
        assert_eq!(bridge(&other().look()).state, State::Warning);
        let ours = other().with("/sys/class/net/godwit0/ifalias", "godwit bridge\n");
        assert_eq!(bridge(&ours.look()).state, State::Ok);
        let nic = empty().with("/sys/class/net/godwit0/mtu", "1500");
        assert_eq!(bridge(&nic.look()).state, State::Problem);
    }

    #[test]
    fn missing_programs_and_kinds_are_named_with_their_remedy() {
        let check = tools(&empty().with("/usr/sbin/ip", "").look());
        assert_eq!(check.mend.as_deref(), Some("apt install nftables"));
        let both = empty().with("/usr/sbin/ip", "").with("/usr/sbin/nft", "");
        assert_eq!(tools(&both.look()).state, State::Ok);
        let look = empty().look();
        let tried = |failed: &[LinkKind]| {
            let result = |kind: &LinkKind| match failed.contains(kind) {
                true => Err("the kernel answered EOPNOTSUPP".to_owned()),
                false => Ok(()),
            };
            let tried: Vec<_> = LinkKind::ALL.iter().map(|kind| (*kind, result(kind))).collect();
            kinds_tried(&look, &tried)
        };
        assert_eq!(tried(&[]).state, State::Ok);
        assert_eq!(tried(&[LinkKind::Vxlan]).state, State::Warning);
        let stops = tried(&[LinkKind::Bridge, LinkKind::Tap]);
        assert_eq!(stops.state, State::Problem);
        assert!(stops.mend.unwrap().starts_with("modprobe -a bridge tun"));
        assert_eq!(nft_tried(&look, None).state, State::Skipped);
        assert_eq!(nft_tried(&look, Some(Ok(()))).state, State::Ok);
        assert_eq!(nft_tried(&look, Some(Err("no".to_owned()))).state, State::Warning);
    }

    #[test]
    fn a_user_is_told_what_root_could_see() {
        let mut look = empty().look();
        look.is_root = false;
        let checks = try_kinds(&look);
        assert!(checks.iter().all(|check| check.state == State::Skipped), "{checks:?}");
        assert_eq!(checks[0].mend.as_deref(), Some("sudo godwit doctor"));
    }
}
