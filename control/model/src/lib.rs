//! The nouns of Godwit, and nothing else: ids, specs, statuses, commands, events, effects.
//!
//! ```text
//!   edge ── Command ──▶ engine ── Effect ──▶ store, agents
//!                         ▲                        │
//!                         └──── Event ◀────────────┘
//! ```
//!
//! Invariants:
//! - One representation of each thing: every other room uses these types; only `wire` wraps them for the road.
//! - Pure values: no clock, randomness, file, network or SQL. Ids and times arrive from outside.
//! - Serialised forms are additive: readers ignore unknown fields and default missing ones, so N reads N-1.
//! - Nothing secret is a plain field: see [`secret::Secret`] and [`seed::UserData`].

pub mod access;
pub mod addressing;
pub mod audit;
pub mod change;
pub mod command;
pub mod event;
pub mod host;
pub mod id;
pub mod layout;
pub mod migration;
pub mod name;
pub mod network;
pub mod operation;
pub mod order;
pub mod policy;
pub mod query;
pub mod refusal;
pub mod secret;
pub mod seed;
pub mod storage;
mod story;
pub mod telemetry;
pub mod template;
pub mod time;
pub mod vm;

pub use access::{Actor, Project, Role, User, Via};
pub use audit::AuditEntry;
pub use change::{Change, Key, Row};
pub use command::{Command, Outcome, Plan, Request};
pub use event::{Effect, Event, Notice};
pub use host::{Host, HostFacts};
pub use id::*;
pub use migration::{Message, Receipt, Round, Stage, Terms};
pub use name::Name;
pub use network::{Mac, Network, Port, Subnet};
pub use operation::{Operation, OperationKind, OperationState};
pub use order::{Definition, Order, Report};
pub use policy::{PortPolicy, PortSpec, SecurityGroup};
pub use refusal::{Code, Refusal};
pub use secret::Secret;
pub use storage::{Digest, Pool, Volume};
pub use story::story;
pub use telemetry::Telemetry;
pub use template::Template;
pub use time::{Millis, Timestamp};
pub use vm::{Vm, VmSpec, VmState, VmStatus};
