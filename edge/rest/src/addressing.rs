//! `/v1/networks/{network}/addressing`: what guests of a network are told beside their IPv4 addresses.

use std::net::IpAddr;

use axum::{extract::State, response::Response};
use model::{
    Command,
    addressing::{Addressing, AddressingMethod, MetadataAccess, V6Prefix},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wire::Problem;

use crate::{
    App,
    extract::{Asked, Choices, Ref},
    failure::Failure,
    outcome::submit,
};

/// What guests of a network are told; what is left out is as in a new network.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NewAddressing {
    /// How guests learn their addresses.
    method: AddressingMethod,
    /// The IPv6 prefix; without it guests have no IPv6.
    v6: Option<V6Prefix>,
    /// Name servers, at most 4.
    #[schema(value_type = Vec<String>)]
    dns: Vec<IpAddr>,
    /// The domain in which guests look for short names.
    search: Option<String>,
    /// How long a guest may keep its address before it asks again, seconds.
    #[schema(minimum = 120, maximum = 604_800)]
    lease_s: u32,
    /// Whether guests may ask their host about themselves.
    metadata: MetadataAccess,
}

impl Default for NewAddressing {
    fn default() -> Self {
        let Addressing {
            method,
            v6,
            dns,
            search,
            lease_s,
            metadata,
        } = Addressing::default();
        Self {
            method,
            v6,
            dns,
            search,
            lease_s,
            metadata,
        }
    }
}

/// Says what a network's guests are told, and how; what is left out is as in a new network. Its IPv6 prefix may change only while it has
/// no ports. VMs that run learn the rest when they are started again or move.
#[utoipa::path(put, path = "/v1/networks/{network}/addressing", tag = "networks", params(("network" = String, Path), Choices),
    request_body = NewAddressing, responses((status = 204), (status = "4XX", body = Problem)))]
pub(crate) async fn set(
    State(app): State<App>,
    Ref(network): Ref,
    asked: Asked<NewAddressing>,
) -> Result<Response, Failure> {
    let NewAddressing {
        method,
        v6,
        dns,
        search,
        lease_s,
        metadata,
    } = asked.body;
    let addressing = Addressing {
        method,
        v6,
        dns,
        search,
        lease_s,
        metadata,
    };
    let command = Command::SetAddressing { network, addressing };
    submit(&app, asked.actor, command, asked.options).await
}
