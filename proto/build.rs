//! Compiles the gRPC messages. Needs `protoc` (Debian: protobuf-compiler).
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=protos/mds.proto");
    tonic_prost_build::configure().bytes(".").compile_protos(&["protos/mds.proto"], &["protos"])?;
    Ok(())
}
