// Draws the binary glTF meshes of a report: no library, no network.
//
// Each <figure class="glb"> carries its GLB as base64 in a <script type="model/gltf-binary"> and a 2D canvas.  One WebGL 2
// context serves all of them, because browsers drop the oldest beyond about 16: a mesh is drawn there, then copied.
// glTF is y-up; the first view stands at +z.  Texture bytes are sRGB and COLOR_0 is linear, as glTF says
// (data-vertex-colours="srgb" for files whose writer did not convert).
"use strict";
(() => {
  const VERTEX_SHADER = `#version 300 es
    uniform mat4 uWorld, uViewProjection;
    uniform bool uVertexSrgb;
    in vec3 aPosition, aNormal;
    in vec4 aColour;
    in vec2 aUv;
    out vec3 vWorld, vNormal;
    out vec4 vColour;
    out vec2 vUv;
    vec3 toLinear(vec3 c) { return mix(c / 12.92, pow((c + 0.055) / 1.055, vec3(2.4)), step(0.04045, c)); }
    void main() {
      vec4 world = uWorld * vec4(aPosition, 1.0);
      vWorld = world.xyz;
      vNormal = transpose(inverse(mat3(uWorld))) * aNormal;
      vColour = uVertexSrgb ? vec4(toLinear(aColour.rgb), aColour.a) : aColour;
      vUv = aUv;
      gl_Position = uViewProjection * world;
    }`;
  const FRAGMENT_SHADER = `#version 300 es
    precision highp float;
    uniform vec3 uEye;
    uniform vec4 uFactor;
    uniform float uAlphaCutoff;
    uniform int uMode;  // 0 lit colours, 1 colours alone, 2 shape, 3 normals
    uniform sampler2D uTexture;
    in vec3 vWorld, vNormal;
    in vec4 vColour;
    in vec2 vUv;
    out vec4 result;
    vec3 toSrgb(vec3 c) { return mix(12.92 * c, 1.055 * pow(c, vec3(1.0 / 2.4)) - 0.055, step(0.0031308, c)); }
    void main() {
      vec4 base = uFactor * vColour * texture(uTexture, vUv);
      if (base.a < uAlphaCutoff) discard;
      vec3 toEye = normalize(uEye - vWorld);
      vec3 normal = dot(vNormal, vNormal) > 0.0 ? normalize(vNormal) : toEye;
      if (dot(normal, toEye) < 0.0) normal = -normal;  // both sides are shown
      float light = 0.35 + 0.65 * max(dot(normal, normalize(toEye + vec3(0.0, 0.5, 0.0))), 0.0);
      vec3 colour = uMode == 1 ? base.rgb : uMode == 2 ? vec3(0.55) * light : base.rgb * light;
      result = vec4(uMode == 3 ? 0.5 + 0.5 * normal : toSrgb(clamp(colour, 0.0, 1.0)), 1.0);
    }`;
  const ATTRIBUTES = ["aPosition", "aNormal", "aColour", "aUv"];
  const READERS = { 5120: "Int8", 5121: "Uint8", 5122: "Int16", 5123: "Uint16", 5125: "Uint32", 5126: "Float32" };
  const BYTES = { 5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4 };
  const LARGEST = { 5120: 127, 5121: 255, 5122: 32767, 5123: 65535, 5125: 4294967295 };
  const WIDTHS = { SCALAR: 1, VEC2: 2, VEC3: 3, VEC4: 4 };
  const FIELD_OF_VIEW = (35 * Math.PI) / 180, START_ELEVATION = (10 * Math.PI) / 180, SPIN_PER_SECOND = 0.4;
  const NO_WEBGL = "This browser offers no WebGL 2, so the mesh cannot be drawn here. Its file is whole: save it and open it "
    + "in any glTF viewer, or open this report in another browser.";

  // ---- matrices: 16 numbers, column-major ----

  function multiply(a, b) {
    const out = new Float32Array(16);
    for (let column = 0; column < 4; column++)
      for (let row = 0; row < 4; row++)
        for (let k = 0; k < 4; k++) out[4 * column + row] += a[4 * k + row] * b[4 * column + k];
    return out;
  }

  function nodeMatrix(node) {
    if (node.matrix) return new Float32Array(node.matrix);
    const [x, y, z, w] = node.rotation || [0, 0, 0, 1];
    const [sx, sy, sz] = node.scale || [1, 1, 1];
    const [tx, ty, tz] = node.translation || [0, 0, 0];
    return new Float32Array([
      sx * (1 - 2 * (y * y + z * z)), sx * 2 * (x * y + z * w), sx * 2 * (x * z - y * w), 0,
      sy * 2 * (x * y - z * w), sy * (1 - 2 * (x * x + z * z)), sy * 2 * (y * z + x * w), 0,
      sz * 2 * (x * z + y * w), sz * 2 * (y * z - x * w), sz * (1 - 2 * (x * x + y * y)), 0,
      tx, ty, tz, 1,
    ]);
  }

  function transformed(m, x, y, z) {
    return [0, 1, 2].map((row) => m[row] * x + m[4 + row] * y + m[8 + row] * z + m[12 + row]);
  }

  /** The camera on a sphere round `centre`: azimuth 0 is +z, turning towards +x; returns its place and view-projection. */
  function orbitCamera(centre, radius, { azimuth, elevation, zoom }, aspect) {
    const [sa, ca, se, ce] = [Math.sin(azimuth), Math.cos(azimuth), Math.sin(elevation), Math.cos(elevation)];
    const distance = (1.05 * radius) / Math.sin(FIELD_OF_VIEW / 2) / zoom;
    const back = [sa * ce, se, ca * ce], right = [ca, 0, -sa], up = [-sa * se, ce, -ca * se];
    const eye = centre.map((c, i) => c + distance * back[i]);
    const along = (axis) => -(axis[0] * eye[0] + axis[1] * eye[1] + axis[2] * eye[2]);
    const view = [
      right[0], up[0], back[0], 0, right[1], up[1], back[1], 0, right[2], up[2], back[2], 0,
      along(right), along(up), along(back), 1,
    ];
    const near = Math.max(distance - 1.1 * radius, 0.01 * radius), far = distance + 1.1 * radius;
    const focal = 1 / Math.tan(FIELD_OF_VIEW / 2);
    const projection = [
      focal / aspect, 0, 0, 0, 0, focal, 0, 0, 0, 0, (far + near) / (near - far), -1, 0, 0, (2 * far * near) / (near - far), 0,
    ];
    return { eye, viewProjection: multiply(projection, view) };
  }

  // ---- reading GLB ----

  function bytesOf(base64) {
    const text = atob(base64.trim());
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  function parseGlb(bytes) {
    const view = new DataView(bytes.buffer);
    let offset = 12, gltf = null, binary = new Uint8Array(0);
    while (offset + 8 <= bytes.length) {
      const length = view.getUint32(offset, true), kind = view.getUint32(offset + 4, true);
      const chunk = bytes.subarray(offset + 8, offset + 8 + length);
      if (kind === 0x4e4f534a) gltf = JSON.parse(new TextDecoder().decode(chunk));
      if (kind === 0x004e4942) binary = chunk;
      offset += 8 + length;
    }
    return { gltf, binary };
  }

  /** An accessor's numbers, without gaps; integers become fractions of their largest where `normalise` or the file says so. */
  function readAccessor({ gltf, binary }, index, normalise = false) {
    const accessor = gltf.accessors[index], kind = accessor.componentType, width = WIDTHS[accessor.type];
    if (accessor.sparse || !READERS[kind] || !width) throw new Error(`accessor ${index} is of a kind not shown here`);
    const out = kind === 5125 ? new Uint32Array(accessor.count * width) : new Float32Array(accessor.count * width);
    if (accessor.bufferView === undefined) return { values: out, width };
    const view = gltf.bufferViews[accessor.bufferView];
    const start = (view.byteOffset || 0) + (accessor.byteOffset || 0), stride = view.byteStride || width * BYTES[kind];
    const data = new DataView(binary.buffer, binary.byteOffset, binary.byteLength);
    const read = data[`get${READERS[kind]}`].bind(data);
    const scale = (normalise || accessor.normalized) && LARGEST[kind] ? 1 / LARGEST[kind] : 1;
    for (let i = 0; i < accessor.count; i++)
      for (let j = 0; j < width; j++) out[i * width + j] = read(start + i * stride + j * BYTES[kind], true) * scale;
    return { values: out, width };
  }

  /** Every (primitive, world matrix) of the scene. */
  function scenePrimitives(gltf) {
    const found = [], nodes = gltf.nodes || [];
    const visit = (index, parent, depth) => {
      const node = nodes[index];
      if (!node || depth > 64) return;
      const world = multiply(parent, nodeMatrix(node));
      if (node.mesh !== undefined)
        for (const primitive of gltf.meshes[node.mesh].primitives)
          if ([4, 5, 6].includes(primitive.mode ?? 4) && primitive.attributes.POSITION !== undefined)
            found.push({ primitive, world });
      for (const child of node.children || []) visit(child, world, depth + 1);
    };
    const scene = (gltf.scenes || [])[gltf.scene || 0] || { nodes: nodes.map((_, i) => i) };
    for (const root of scene.nodes || []) visit(root, nodeMatrix({}), 0);
    return found;
  }

  /** Area-weighted vertex normals for meshes that carry none: marching cubes' triangles are too small to show flat. */
  function smoothNormals(positions, indices) {
    const normals = new Float32Array(positions.length);
    for (let t = 0; t + 2 < indices.length; t += 3) {
      const [a, b, c] = [3 * indices[t], 3 * indices[t + 1], 3 * indices[t + 2]];
      const u = [0, 1, 2].map((i) => positions[b + i] - positions[a + i]);
      const v = [0, 1, 2].map((i) => positions[c + i] - positions[a + i]);
      for (let i = 0; i < 3; i++) {
        const n = u[(i + 1) % 3] * v[(i + 2) % 3] - u[(i + 2) % 3] * v[(i + 1) % 3];
        normals[a + i] += n; normals[b + i] += n; normals[c + i] += n;
      }
    }
    return normals;
  }

  /** Centre of the bounding box and the radius round it that holds every vertex. */
  function boundsOf(parts) {
    const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
    const each = (use) => {
      for (const { positions, world } of parts)
        for (let i = 0; i < positions.length; i += 3) use(transformed(world, positions[i], positions[i + 1], positions[i + 2]));
    };
    each((p) => p.forEach((value, i) => { low[i] = Math.min(low[i], value); high[i] = Math.max(high[i], value); }));
    const centre = low.map((value, i) => (value + high[i]) / 2);
    let radius = 0;
    each((p) => { radius = Math.max(radius, Math.hypot(p[0] - centre[0], p[1] - centre[1], p[2] - centre[2])); });
    if (!Number.isFinite(radius) || radius === 0) throw new Error("it has no extent");
    return { centre, radius };
  }

  // ---- the one WebGL context ----

  let shared;  // undefined: not tried; null: this browser has none

  function makeShared() {
    const canvas = document.createElement("canvas");
    const gl = canvas.getContext("webgl2", { antialias: true, alpha: true });
    if (!gl) return null;
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX_SHADER], [gl.FRAGMENT_SHADER, FRAGMENT_SHADER]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    ATTRIBUTES.forEach((name, place) => gl.bindAttribLocation(program, place, name));
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(`the shader: ${gl.getProgramInfoLog(program)}`);
    gl.useProgram(program);
    gl.enable(gl.DEPTH_TEST);
    gl.vertexAttrib4f(ATTRIBUTES.indexOf("aColour"), 1, 1, 1, 1);  // what a mesh without colours or UVs gets
    gl.vertexAttrib4f(ATTRIBUTES.indexOf("aUv"), 0, 0, 0, 1);
    const uniforms = {};
    for (const name of ["uWorld", "uViewProjection", "uVertexSrgb", "uEye", "uFactor", "uAlphaCutoff", "uMode"])
      uniforms[name] = gl.getUniformLocation(program, name);
    const white = uploadTexture(gl, new ImageData(new Uint8ClampedArray([255, 255, 255, 255]), 1, 1), {});
    canvas.addEventListener("webglcontextlost", () => {  // after sleep or a driver's crash: begin anew
      shared = undefined;
      viewers.forEach((v) => { v.model = null; });
      schedule();
    });
    return { canvas, gl, uniforms, white };
  }

  function uploadTexture(gl, picture, sampler) {
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.SRGB8_ALPHA8, gl.RGBA, gl.UNSIGNED_BYTE, picture);
    gl.generateMipmap(gl.TEXTURE_2D);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR_MIPMAP_LINEAR);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, sampler.magFilter || gl.LINEAR);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_S, sampler.wrapS || gl.REPEAT);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_T, sampler.wrapT || gl.REPEAT);
    return texture;
  }

  async function loadTexture(gl, { gltf, binary }, index) {
    const texture = gltf.textures[index], image = gltf.images[texture.source];
    let bytes;
    if (image.bufferView === undefined) bytes = bytesOf(image.uri.slice(image.uri.indexOf(",") + 1));
    else {
      const view = gltf.bufferViews[image.bufferView];
      bytes = binary.subarray(view.byteOffset || 0, (view.byteOffset || 0) + view.byteLength);
    }
    const options = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
    const picture = await createImageBitmap(new Blob([bytes], { type: image.mimeType || "image/png" }), options);
    return uploadTexture(gl, picture, (gltf.samplers || [])[texture.sampler] || {});
  }

  function uploadPart(gl, file, { primitive, world }) {
    const { attributes } = primitive, material = (file.gltf.materials || [])[primitive.material] || {};
    const { baseColorFactor = [1, 1, 1, 1], baseColorTexture } = material.pbrMetallicRoughness || {};
    const optional = (name, normalise) => (attributes[name] === undefined ? null : readAccessor(file, attributes[name], normalise));
    const position = readAccessor(file, attributes.POSITION);
    const count = position.values.length / 3;
    const indices = primitive.indices === undefined
      ? Uint32Array.from({ length: count }, (_, i) => i) : Uint32Array.from(readAccessor(file, primitive.indices).values);
    if (indices.some((index) => index >= count)) throw new Error("an index points beyond its vertices");
    const triangles = (primitive.mode ?? 4) === 4;
    const normal = optional("NORMAL") || (triangles && { values: smoothNormals(position.values, indices), width: 3 });
    const uv = optional(`TEXCOORD_${baseColorTexture?.texCoord || 0}`);
    const vertexArray = gl.createVertexArray();
    gl.bindVertexArray(vertexArray);
    [position, normal, optional("COLOR_0", true), uv].forEach((data, place) => {
      if (!data) return;
      gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
      gl.bufferData(gl.ARRAY_BUFFER, data.values, gl.STATIC_DRAW);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, data.width, gl.FLOAT, false, 0, 0);
    });
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, indices, gl.STATIC_DRAW);
    gl.bindVertexArray(null);
    return {
      vertexArray, world, count: indices.length, mode: primitive.mode ?? 4, positions: position.values,
      factor: baseColorFactor, textureIndex: baseColorTexture?.index, texture: null,
      alphaCutoff: material.alphaMode === "MASK" ? material.alphaCutoff ?? 0.5 : 0,
    };
  }

  async function loadModel(gl, base64) {
    const file = parseGlb(bytesOf(base64));
    const parts = scenePrimitives(file.gltf).map((found) => uploadPart(gl, file, found));
    const bounds = boundsOf(parts);
    const textures = new Map();
    for (const part of parts) {
      part.positions = null;
      if (part.textureIndex === undefined) continue;
      if (!textures.has(part.textureIndex)) textures.set(part.textureIndex, await loadTexture(gl, file, part.textureIndex));
      part.texture = textures.get(part.textureIndex);
    }
    return { parts, ...bounds };
  }

  // ---- viewers ----

  const viewers = [];
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  let scheduled = false, lastTime = 0;

  function draw(viewer) {
    const { gl, canvas, uniforms, white } = shared, { model, canvas: target } = viewer;
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.max(1, Math.round(target.clientWidth * ratio)), height = Math.max(1, Math.round(target.clientHeight * ratio));
    if (target.width !== width || target.height !== height) { target.width = width; target.height = height; }
    if (canvas.width < width || canvas.height < height) {
      canvas.width = Math.max(canvas.width, width);
      canvas.height = Math.max(canvas.height, height);
    }
    gl.viewport(0, 0, width, height);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const { eye, viewProjection } = orbitCamera(model.centre, model.radius, viewer.camera, width / height);
    gl.uniformMatrix4fv(uniforms.uViewProjection, false, viewProjection);
    gl.uniform3fv(uniforms.uEye, eye);
    gl.uniform1i(uniforms.uMode, Number(viewer.shading.value));
    gl.uniform1i(uniforms.uVertexSrgb, viewer.vertexSrgb ? 1 : 0);
    for (const part of model.parts) {
      gl.uniformMatrix4fv(uniforms.uWorld, false, part.world);
      gl.uniform4fv(uniforms.uFactor, part.factor);
      gl.uniform1f(uniforms.uAlphaCutoff, part.alphaCutoff);
      gl.bindTexture(gl.TEXTURE_2D, part.texture || white);
      gl.bindVertexArray(part.vertexArray);
      gl.drawElements(part.mode, part.count, gl.UNSIGNED_INT, 0);
    }
    const pen = target.getContext("2d");
    pen.clearRect(0, 0, width, height);
    pen.drawImage(canvas, 0, canvas.height - height, width, height, 0, 0, width, height);
    viewer.dirty = false;
  }

  /** Loads what has come into view, turns what turns, draws what changed. */
  function frame(now) {
    scheduled = false;
    const seconds = Math.min((now - lastTime) / 1000, 0.1);
    lastTime = now;
    for (const viewer of viewers.filter((v) => v.visible && !v.failed)) {
      if (!viewer.model) { load(viewer); continue; }
      if (viewer.spinning) viewer.camera.azimuth += SPIN_PER_SECOND * seconds;
      if (viewer.spinning || viewer.dirty) draw(viewer);
    }
    if (viewers.some((v) => v.visible && v.model && v.spinning)) schedule();
  }

  function schedule() {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(frame);
  }

  async function load(viewer) {
    if (viewer.loading) return;
    viewer.loading = true;
    try {
      if (shared === undefined) shared = makeShared();
      if (!shared) throw new Error(NO_WEBGL);
      const { gl } = shared;
      const model = await loadModel(gl, viewer.base64());
      if (shared && shared.gl === gl) viewer.model = model;  // else the context was lost meanwhile: load again
      viewer.message.hidden = true;
    } catch (error) {
      viewer.failed = true;
      viewer.spinning = false;
      viewer.message.hidden = false;
      viewer.message.textContent = error.message === NO_WEBGL ? NO_WEBGL : `This mesh cannot be drawn: ${error.message}.`;
    }
    viewer.loading = false;
    viewer.dirty = true;
    schedule();
  }

  function resetCamera(viewer) {
    viewer.camera = { azimuth: 0, elevation: START_ELEVATION, zoom: 1 };
  }

  function move(viewer, { azimuth = 0, elevation = 0, zoom = 1, spin = false }) {
    const camera = viewer.camera, limit = (89 * Math.PI) / 180;
    camera.azimuth += azimuth;
    camera.elevation = Math.min(limit, Math.max(-limit, camera.elevation + elevation));
    camera.zoom = Math.min(8, Math.max(0.25, camera.zoom * zoom));
    viewer.spinning = spin;
    viewer.dirty = true;
    schedule();
  }

  const ACTIONS = {
    ArrowLeft: (v) => move(v, { azimuth: -0.15 }), ArrowRight: (v) => move(v, { azimuth: 0.15 }),
    ArrowUp: (v) => move(v, { elevation: 0.15 }), ArrowDown: (v) => move(v, { elevation: -0.15 }),
    "+": (v) => move(v, { zoom: 1.2 }), "=": (v) => move(v, { zoom: 1.2 }), "-": (v) => move(v, { zoom: 1 / 1.2 }),
    " ": (v) => move(v, { spin: !v.spinning }),
    Home: (v) => { resetCamera(v); move(v, {}); },
  };

  function listen(viewer) {
    const { canvas, figure } = viewer;
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); move(viewer, {}); });
    canvas.addEventListener("pointermove", (event) => {
      if (canvas.hasPointerCapture(event.pointerId))
        move(viewer, { azimuth: -0.01 * event.movementX, elevation: 0.01 * event.movementY });
    });
    canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== canvas) return;  // the page scrolls until the mesh is clicked or tabbed to
      event.preventDefault();
      move(viewer, { zoom: Math.exp(-0.0015 * event.deltaY) });
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      if (!ACTIONS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      ACTIONS[event.key](viewer);
    });
    for (const button of figure.querySelectorAll("button[data-key]"))
      button.addEventListener("click", () => ACTIONS[button.dataset.key](viewer));
    viewer.shading.addEventListener("change", () => move(viewer, { spin: viewer.spinning }));
    figure.querySelector("button[data-save]").addEventListener("click", (event) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([bytesOf(viewer.base64())], { type: "model/gltf-binary" }));
      link.download = event.currentTarget.dataset.save;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    });
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const viewer = viewers.find((v) => v.figure === entry.target);
      viewer.visible = entry.isIntersecting;
      viewer.dirty = true;
    }
    schedule();
  }, { rootMargin: "200px" });

  for (const figure of document.querySelectorAll("figure.glb")) {
    const data = figure.querySelector('script[type="model/gltf-binary"]');
    const viewer = {
      figure, canvas: figure.querySelector("canvas"), message: figure.querySelector(".glb-message"),
      shading: figure.querySelector("select"), base64: () => data.textContent,
      vertexSrgb: figure.dataset.vertexColours === "srgb",
      model: null, loading: false, failed: false, visible: false, dirty: true, spinning: !still,
    };
    resetCamera(viewer);
    viewers.push(viewer);
    listen(viewer);
    watcher.observe(figure);
  }
  window.addEventListener("resize", () => { viewers.forEach((v) => { v.dirty = true; }); schedule(); });
})();
