//! How much passes a port: a token bucket on the tap for what the guest is sent, and one on an `ifb` for what it sends.
//!
//! ```text
//!   bridge ──▶ [tbf] tap ──▶ guest
//!   bridge ◀── tap ◀── ifb gi3k0… [tbf] ◀── redirected ── tap ◀── guest
//! ```
//!
//! A bucket holds frames back, up to a quarter of a second's worth, where policing would drop them: what guests hand over comes in pieces
//! of 64 KiB, and TCP under a policer keeps well below its rate. Sources: tc-tbf(8), linux/pkt_sched.h, linux/pkt_cls.h.

use model::{PortId, PortPolicy, policy::RateLimit};
use rustix::io::Errno;

use crate::{
    Network,
    link::{self, Change},
    netlink::{self, FLAG_CREATE, FLAG_REPLACE, Message, Netlink, NetlinkError},
    port::{PortError, failure, tap_name},
};

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const ROOT: u32 = 0xffff_ffff;
const INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
const BUCKET_HANDLE: u32 = 0x0001_0000;
const LINK_LAYER_ETHERNET: u8 = 1;
const ACT_STOLEN: u32 = 4;
const EGRESS_REDIRECT: u32 = 1;
const U32_TERMINAL: u8 = 1;
/// Least that waits before a frame is dropped, bytes: some of the largest pieces.
const WAITING_MIN: u64 = 512 << 10;
/// The part of a second that may wait.
const WAITING_PART: u64 = 4;

impl Network {
    /// Limits what passes a port, or lets it pass freely, at once. Without the port's tap there is nothing to limit.
    ///
    /// # Errors
    /// [`PortError`]; one direction may have been limited.
    pub fn set_limits(&self, id: PortId, policy: &PortPolicy) -> Result<(), PortError> {
        let (tap, ifb) = (tap_name(id), ifb_name(id));
        let netlink = &mut *self.slow();
        let fail = failure(&tap, "limit");
        let Some(found) = link::find(netlink, &tap).map_err(&fail)? else {
            return Ok(());
        };
        match &policy.to_guest {
            Some(limit) => netlink.execute(&[bucket(found.index, limit)]).map_err(&fail)?,
            None => remove(netlink, &no_qdisc(found.index, ROOT)).map_err(&fail)?,
        }
        match &policy.from_guest {
            Some(limit) => {
                let ifb = ensure_ifb(netlink, &ifb, id, found.mtu).map_err(&fail)?;
                netlink.execute(&[bucket(ifb, limit)]).map_err(&fail)?;
                remove(netlink, &no_qdisc(found.index, INGRESS)).map_err(&fail)?;
                netlink
                    .execute(&[ingress(found.index), redirect(found.index, ifb)])
                    .map_err(fail)
            }
            None => {
                remove(netlink, &no_qdisc(found.index, INGRESS)).map_err(&fail)?;
                remove_ifb(netlink, &ifb).map_err(fail)
            }
        }
    }

    /// Removes what is left of a port's limits once its tap is gone. None is fine.
    pub(crate) fn remove_limits(&self, tap: &str) -> Result<(), NetlinkError> {
        remove_ifb(&mut self.slow(), &ifb_of(tap))
    }
}

/// The name of the `ifb` of a port: as its tap's, but for the second letter.
fn ifb_name(id: PortId) -> String {
    ifb_of(&tap_name(id))
}

fn ifb_of(tap: &str) -> String {
    tap.replacen("gw", "gi", 1)
}

fn ensure_ifb(netlink: &mut Netlink, name: &str, id: PortId, mtu: u32) -> Result<u32, NetlinkError> {
    if link::find(netlink, name)?.is_none() {
        netlink.execute(&[link::create_ifb(name)])?;
    }
    let gone = NetlinkError::Refused {
        errno: Errno::NODEV,
        detail: None,
    };
    let index = link::find(netlink, name)?.ok_or(gone)?.index;
    let alias = format!("godwit limit {id}");
    netlink.execute(&[
        Change::of(index).alias(&alias).mtu(mtu).message(),
        Change::up(index).message(),
    ])?;
    Ok(index)
}

fn remove_ifb(netlink: &mut Netlink, name: &str) -> Result<(), NetlinkError> {
    match link::find(netlink, name)? {
        Some(found) if found.kind == "ifb" => remove(netlink, &link::delete(found.index)),
        _ => Ok(()),
    }
}

/// What is not there is removed.
fn remove(netlink: &mut Netlink, message: &Message) -> Result<(), NetlinkError> {
    match netlink.execute(std::slice::from_ref(message)) {
        Err(error) if matches!(error.errno(), Some(Errno::NOENT | Errno::INVAL | Errno::NODEV)) => Ok(()),
        other => other,
    }
}

/// `struct tcmsg`.
fn header(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    for (at, value) in [(4, index), (8, handle), (12, parent), (16, info)] {
        bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    bytes
}

/// A token bucket as the root of an interface, in place of one that is there.
fn bucket(index: u32, limit: &RateLimit) -> Message {
    let rate = limit.bytes_per_s;
    let waiting = (rate / WAITING_PART).max(WAITING_MIN) + limit.burst();
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_ne_bytes();
    // `struct tc_tbf_qopt`: two `tc_ratespec`, of which the second, for peaks, is not used; what waits; burst and MTU as times.
    let mut parameters = vec![0, LINK_LAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    parameters.extend(word(rate));
    parameters.extend([0; 12]);
    parameters.extend(word(waiting));
    parameters.extend([0; 8]);
    Message::new(
        RTM_NEWQDISC,
        FLAG_CREATE | FLAG_REPLACE,
        &header(index, BUCKET_HANDLE, ROOT, 0),
    )
    .text(TCA_KIND, "tbf")
    .nest(TCA_OPTIONS, |m| {
        m.attr(TCA_TBF_PARMS, &parameters)
            .attr(TCA_TBF_BURST, &word(limit.burst()))
            .attr(TCA_TBF_RATE64, &rate.to_ne_bytes())
    })
}

fn no_qdisc(index: u32, parent: u32) -> Message {
    Message::new(RTM_DELQDISC, 0, &header(index, 0, parent, 0))
}

/// The place at which what comes from a guest can be redirected.
fn ingress(index: u32) -> Message {
    let flags = FLAG_CREATE | netlink::FLAG_EXCL;
    Message::new(RTM_NEWQDISC, flags, &header(index, INGRESS_HANDLE, INGRESS, 0)).text(TCA_KIND, "ingress")
}

/// Every frame goes through the other interface first.
fn redirect(index: u32, to: u32) -> Message {
    const ALL_PROTOCOLS: u32 = (libc::ETH_P_ALL as u16).to_be() as u32;
    const FIRST: u32 = 1 << 16;
    // `struct tc_u32_sel` with one key that fits everything.
    let mut selector = vec![U32_TERMINAL, 0, 1, 0];
    selector.extend([0; 12]);
    selector.extend([0; 16]);
    // `struct tc_mirred`.
    let mut mirred = vec![];
    for value in [0, 0, ACT_STOLEN, 0, 0, EGRESS_REDIRECT, to] {
        mirred.extend(value.to_ne_bytes());
    }
    let flags = FLAG_CREATE | netlink::FLAG_EXCL;
    Message::new(
        RTM_NEWTFILTER,
        flags,
        &header(index, 0, INGRESS_HANDLE, FIRST | ALL_PROTOCOLS),
    )
    .text(TCA_KIND, "u32")
    .nest(TCA_OPTIONS, |m| {
        m.attr(TCA_U32_SEL, &selector).nest(TCA_U32_ACT, |m| {
            m.nest(1, |m| {
                m.text(TCA_ACT_KIND, "mirred")
                    .nest(TCA_ACT_OPTIONS, |m| m.attr(TCA_MIRRED_PARMS, &mirred))
            })
        })
    })
}
