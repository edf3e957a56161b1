//! Prints the OpenAPI document: `cargo run -p rest --example openapi > docs/openapi.json`.

fn main() {
    print!("{}", rest::openapi_json());
}
