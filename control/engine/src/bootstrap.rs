//! The rows of a new cell: project `default`, its network `default` with one subnet, and the first administrator's token.

use std::net::Ipv4Addr;

use model::{
    Actor, Change, Network, NetworkId, Project, ProjectId, Role, Row, Subnet, SubnetId, TokenId,
    access::{ApiToken, Quota, TokenHash, TokenKind, Usage, Via},
    addressing::Addressing,
    network::NetworkMode,
};

use crate::world::World;

/// What a new cell is made of: ids and addresses arrive from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootstrap {
    /// Id of project `default`.
    pub project: ProjectId,
    /// Id of network `default`.
    pub network: NetworkId,
    /// Id of its subnet.
    pub subnet: SubnetId,
    /// Address part of the subnet: `10.91.0.0`.
    pub address: Ipv4Addr,
    /// Prefix length of the subnet: 16.
    pub prefix: u8,
    /// The way out, if there is one.
    pub gateway: Option<Ipv4Addr>,
    /// First address given to ports.
    pub first: Ipv4Addr,
    /// Last address given to ports.
    pub last: Ipv4Addr,
    /// Largest packet, bytes: 1500.
    pub mtu: u16,
    /// Id of the first administrator's token.
    pub token: TokenId,
    /// Hash of its secret.
    pub token_hash: TokenHash,
    /// Whom it speaks for: `admin`.
    pub subject: String,
}

impl World {
    /// The rows of a new cell, to be stored and loaded.
    #[must_use]
    pub fn bootstrap(b: &Bootstrap) -> Vec<Change> {
        let name: model::Name = "default".parse().expect("`default` is a name");
        let rows = [
            Row::Project(Project {
                id: b.project,
                name: name.clone(),
                quota: Quota::default(),
                used: Usage::default(),
            }),
            Row::Network(Network {
                id: b.network,
                project: b.project,
                name,
                mode: NetworkMode::Bridged,
                mtu: b.mtu,
                addressing: Addressing::default(),
            }),
            Row::Subnet(Subnet {
                id: b.subnet,
                network: b.network,
                address: b.address,
                prefix: b.prefix,
                gateway: b.gateway,
                first: b.first,
                last: b.last,
            }),
            Row::ApiToken(ApiToken {
                id: b.token,
                hash: b.token_hash,
                actor: Actor {
                    subject: b.subject.clone(),
                    project: b.project,
                    role: Role::CloudAdmin,
                    via: Via::default(),
                },
                expires_at: None,
                name: None,
                kind: TokenKind::Service,
                owner: None,
                created_by: b.subject.clone(),
                created_at: None,
            }),
        ];
        rows.into_iter().map(Change::Put).collect()
    }
}
