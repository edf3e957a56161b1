//! What a guest may ask about itself, as EC2's instance metadata service and NoCloud over HTTP serve it.
//!
//! Sources: the paths that cloud-init's DataSourceEc2 and DataSourceNoCloudNet read; standards.md lists the versions.

use std::{net::Ipv4Addr, time::Duration};

use model::{
    addressing::{MetadataAccess, V6_PREFIX_LENGTH},
    order::PortUse,
};
use serde_json::json;

use crate::{
    Guest,
    http::{Method, Reply, Request},
    token::{Key, TTL_S_MAX},
};

const VERSIONS: [&str; 5] = ["2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest"];
const TOKEN_PATH: &str = "/latest/api/token";

/// What a guest was told at its first start. User-data is a secret: it is served to the guest alone and never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// Its host name.
    pub hostname: String,
    /// Public keys of the people who may log in.
    pub public_keys: Vec<String>,
    /// For cloud-init; `None` for nothing.
    pub user_data: Option<Vec<u8>>,
    /// Its network cards, as NoCloud says them.
    pub network_config: Option<Vec<u8>>,
}

/// What is to be done with a request.
pub(crate) enum Verdict {
    /// This is answered.
    Reply(Reply),
    /// What the guest was told is needed for it.
    NeedsTold,
}

/// Decides a request, with what the guest was told where that is at hand.
pub(crate) fn answer(guest: &Guest, told: Option<&Told>, key: &Key, request: &Request, now: Duration) -> Verdict {
    let refuse = |status| Verdict::Reply(Reply::status(status));
    let access = guest.port().addressing.metadata;
    if access == MetadataAccess::Off {
        return refuse(404);
    }
    // Who passes requests on is a proxy, and who asked it is not known.
    if request.forwarded {
        return refuse(403);
    }
    match request.method {
        Method::Put if request.path == TOKEN_PATH => return Verdict::Reply(session(guest, key, request, now)),
        Method::Put => return refuse(404),
        Method::Other => return refuse(405),
        Method::Get | Method::Head => {}
    }
    let admitted = request.token.as_deref().map(|token| key.admits(guest.vm, token, now));
    if admitted == Some(false) || (admitted.is_none() && access == MetadataAccess::Token) {
        return refuse(401);
    }
    let Some(told) = told else {
        return Verdict::NeedsTold;
    };
    Verdict::Reply(find(&tree(guest, told), &request.path))
}

fn session(guest: &Guest, key: &Key, request: &Request, now: Duration) -> Reply {
    let ttl_s = request.ttl.as_deref().and_then(|ttl| ttl.parse().ok());
    match ttl_s.filter(|ttl| (1..=TTL_S_MAX).contains(ttl)) {
        None => Reply::status(400),
        Some(ttl_s) => Reply {
            status: 200,
            body: key.token(guest.vm, ttl_s, now).into_bytes(),
            ttl_s: Some(ttl_s),
            json: false,
        },
    }
}

/// A thing under a path.
enum Node {
    Leaf(Vec<u8>),
    /// Each by its name, and by what it is listed as where that is something else.
    Folder(Vec<(String, Option<String>, Node)>),
}

fn leaf(name: &str, text: impl ToString) -> (String, Option<String>, Node) {
    (name.to_owned(), None, Node::Leaf(text.to_string().into_bytes()))
}

fn folder(name: &str, nodes: Vec<(String, Option<String>, Node)>) -> (String, Option<String>, Node) {
    (name.to_owned(), None, Node::Folder(nodes))
}

fn find(root: &Node, path: &str) -> Reply {
    let mut node = root;
    for part in path.split('/').filter(|part| !part.is_empty()) {
        let found = match node {
            Node::Folder(nodes) => nodes.iter().find(|(name, ..)| name == part),
            Node::Leaf(_) => None,
        };
        match found {
            Some((_, _, found)) => node = found,
            None => return Reply::status(404),
        }
    }
    let body = match node {
        Node::Leaf(bytes) => bytes.clone(),
        Node::Folder(nodes) => {
            let lines = nodes.iter().map(|(name, listed, node)| match (listed, node) {
                (Some(listed), _) => listed.clone(),
                (None, Node::Folder(_)) => format!("{name}/"),
                (None, Node::Leaf(_)) => name.clone(),
            });
            lines.collect::<Vec<_>>().join("\n").into_bytes()
        }
    };
    Reply {
        status: 200,
        body,
        ..Reply::default()
    }
}

fn tree(guest: &Guest, told: &Told) -> Node {
    let of_version = |version: &&str| {
        let mut nodes = vec![folder("meta-data", meta_data(guest, told))];
        if let Some(data) = &told.user_data {
            nodes.push(("user-data".to_owned(), None, Node::Leaf(data.clone())));
        }
        folder(version, nodes)
    };
    let mut nodes: Vec<_> = VERSIONS.iter().map(of_version).collect();
    nodes.push(folder("nocloud", no_cloud(guest, told)));
    Node::Folder(nodes)
}

fn meta_data(guest: &Guest, told: &Told) -> Vec<(String, Option<String>, Node)> {
    let mut nodes = vec![
        leaf("hostname", &told.hostname),
        leaf("instance-id", guest.vm),
        leaf("instance-type", format!("{}-{}", guest.vcpus, guest.memory_mib)),
        leaf("local-hostname", &told.hostname),
    ];
    if let Some(first) = guest.ports.first() {
        nodes.push(leaf("local-ipv4", first.ip));
        nodes.push(leaf("mac", first.mac));
        nodes.extend(first.v6.map(|ip| leaf("ipv6", ip)));
    }
    let cards = guest
        .ports
        .iter()
        .enumerate()
        .map(|(number, port)| card(number, port, told));
    let macs = folder("macs", cards.collect());
    nodes.push(folder("network", vec![folder("interfaces", vec![macs])]));
    nodes.push(folder("placement", vec![leaf("host-id", guest.host)]));
    if !told.public_keys.is_empty() {
        let keys = told.public_keys.iter().enumerate().map(|(number, key)| {
            let key = Node::Folder(vec![leaf("openssh-key", key)]);
            // Its comment may be anything; EC2 has the name of a key pair here.
            (number.to_string(), Some(format!("{number}=key-{number}")), key)
        });
        nodes.push(folder("public-keys", keys.collect()));
    }
    nodes
}

fn card(number: usize, port: &PortUse, told: &Told) -> (String, Option<String>, Node) {
    let mask = u32::MAX.checked_shl(32 - u32::from(port.prefix.min(32))).unwrap_or(0);
    let subnet = Ipv4Addr::from_bits(port.ip.to_bits() & mask);
    let mut nodes = vec![
        leaf("device-number", number),
        leaf("interface-id", port.port),
        leaf("local-hostname", &told.hostname),
        leaf("local-ipv4s", port.ip),
        leaf("mac", port.mac),
        leaf("subnet-ipv4-cidr-block", format!("{subnet}/{}", port.prefix)),
    ];
    if let (Some(ip), Some(prefix)) = (port.v6, port.addressing.v6) {
        nodes.push(leaf("ipv6s", ip));
        nodes.push(leaf(
            "subnet-ipv6-cidr-blocks",
            format!("{}/{V6_PREFIX_LENGTH}", prefix.address),
        ));
    }
    folder(&port.mac.to_string(), nodes)
}

/// What NoCloud reads when it is given this place (`ds=nocloud;s=http://169.254.169.254/nocloud/`).
fn no_cloud(guest: &Guest, told: &Told) -> Vec<(String, Option<String>, Node)> {
    let meta_data = json!({
        "instance-id": guest.vm,
        "local-hostname": told.hostname,
        "public-keys": told.public_keys,
    });
    let user_data = told
        .user_data
        .clone()
        .unwrap_or_else(|| b"#cloud-config\n{}\n".to_vec());
    let mut nodes = vec![
        leaf("meta-data", meta_data),
        ("user-data".to_owned(), None, Node::Leaf(user_data)),
        leaf("vendor-data", ""),
    ];
    if let Some(config) = &told.network_config {
        nodes.push(("network-config".to_owned(), None, Node::Leaf(config.clone())));
    }
    nodes
}
