// Accessories: frames of glasses, cloth, lenses.
in vec3 point, outward, place;
in vec4 painted;  // colour, and gloss or a lens's opacity
flat in float matter;
out vec4 colour;

void main() {
    vec3 normal = normalize(outward), view = normalize(eye - point);
    if (dot(normal, view) < 0.) normal = -normal;
    if (matter > 1.5) {
        // A lens reflects the key light and the sky.
        vec3 back = reflect(-view, normal);
        float fresnel = .04 + .5 * pow(1. - max(0., dot(normal, view)), 4.);
        float gleam = smoothstep(.93, .99, dot(back, normalize(lights[0]))) * .5;
        vec3 seen = sky * 1.5 * smoothstep(-.1, .6, back.y) * fresnel + gleam * lights[1];
        colour = vec4(developed(painted.rgb * painted.a * .4 + seen), clamp(painted.a + fresnel * .5 + gleam, 0., .9));
        return;
    }
    vec3 c = painted.rgb;
    float arrives = key_arrives(point, normal);
    Surface s = Surface(c, vec3(0), painted.a, .4, .1, 1., 1., arrives);
    if (matter > .5) {
        float knit = .5 + .5 * sin(place.y * 95. + 2. * noise(place * 9.)) * sin(atan(place.x, place.z - .4) * 70.);
        s = Surface(c * (.72 + .28 * knit) * (.8 + .4 * octaves(place * 12.)), vec3(0), .1, .03, .25, 1., 1., arrives);
    }
    colour = vec4(developed(lit(s, normal, view)), 1);
}
